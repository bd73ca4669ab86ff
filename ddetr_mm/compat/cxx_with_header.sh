#!/bin/sh
# Stands for the C++ compiler while mmcv's ops are built. Every file includes torch's headers, which
# take most of its time: they are compiled once, with the first file's own flags, and then reused.
# A compiler that cannot use the result reads the header as text, so the outcome is the same.
#   REAL_CXX       the compiler
#   TORCH_HEADER   a header file in a folder of its own
set -eu

case " $* " in
*" -c "*) ;;
*) exec "$REAL_CXX" "$@" ;;
esac

precompile() {
    # The first file's command, without what names that file and its outputs.
    skip=0
    count=$#
    while [ "$count" -gt 0 ]; do
        argument=$1
        shift
        count=$((count - 1))
        if [ "$skip" = 1 ]; then
            skip=0
            continue
        fi
        case $argument in
        -c | -MMD | -MD) ;;
        -o | -MF) skip=1 ;;
        *.cpp | *.cc) ;;
        *) set -- "$@" "$argument" ;;
        esac
    done
    if "$REAL_CXX" "$@" -x c++-header "$TORCH_HEADER" -o "$TORCH_HEADER.part"; then
        mv "$TORCH_HEADER.part" "$TORCH_HEADER.gch"
    fi
}

if mkdir "$TORCH_HEADER.turn" 2>/dev/null; then
    precompile "$@" || true
    : >"$TORCH_HEADER.done"
fi
while [ ! -e "$TORCH_HEADER.done" ]; do sleep 0.2; done
exec "$REAL_CXX" -include "$TORCH_HEADER" "$@"
