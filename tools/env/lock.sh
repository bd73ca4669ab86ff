#!/bin/sh
# Resolve tools/env/*.in into the pinned sets beside them, for every supported Python at once.
# Versions that are pinned already are kept; `sh lock.sh --upgrade` takes the newest ones.
set -eu
cd "$(dirname "$0")"
: "${UV:=uv}"
for stack in torch2.14 torch2.11 onedl; do
    own="$stack.overrides.txt"
    "$UV" pip compile "$stack.in" -o "$stack.txt" --universal --python-version 3.10 --no-python-downloads \
        --override overrides.txt $(test ! -e "$own" || echo "--override $own") --only-binary :all: \
        --no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" --quiet "$@"
done
