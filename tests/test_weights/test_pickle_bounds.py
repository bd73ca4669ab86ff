"""Pickles that describe more than they hold are refused before anything is built."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights.pickle_bounds import MAX_DEPTH, OutOfBounds, check_pickle
from ddetr_mm.weights.safe_read import read_raw

PROTOCOLS = (0, 1, 2, 4, 5)


def doubled(times: int, kind: type = tuple) -> Any:
    value = kind()
    for _ in range(times):
        value = kind((value, value))
    return value


def late() -> list:
    """Lists that share one another, of which the innermost is filled last."""
    innermost: list = []
    value = innermost
    for _ in range(3):
        value = [value] * 300
    innermost.extend(range(300))
    return value


def deep(levels: int) -> list:
    outer: list = []
    inner = outer
    for _ in range(levels):
        inner.append([])
        inner = inner[0]
    return outer


BOMBS = {
    "doubled tuple": doubled(40),
    "doubled lists": doubled(40, list),
    "filled late": late(),
    "deep": deep(MAX_DEPTH + 1),
    "wide": [[[0] * 2000] * 2000] * 2000,
}
SOUND = {
    "state": {"state": {0: {"step": 1, "exp_avg": (1.0, 2.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
    "deep": deep(MAX_DEPTH - 2),
    "many": {f"key{number}": [number] * 10 for number in range(5000)},
    "bytes": bytearray(b"abc"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name, protocol):
    with pytest.raises(OutOfBounds):
        check_pickle(pickle.dumps(BOMBS[name], protocol))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", SOUND)
def test_plain_data_pass(name, protocol):
    check_pickle(pickle.dumps(SOUND[name], protocol))


def test_a_list_in_itself_passes():
    """OmegaConf's nodes know their parents; nothing here follows such links."""
    itself: list = []
    itself.append(itself)
    check_pickle(pickle.dumps(itself))


@pytest.mark.parametrize(
    "pickled",
    [
        b"0.",
        b"K\x01a.",
        b"(.",
        b"\x80\x02h\x00.",
        b"a.",
        b"]a.",
        b"(]e.",
        b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    ],
)
def test_stacks_out_of_order_and_claims_of_memory_are_refused(pickled):
    with pytest.raises((OutOfBounds, ValueError)):
        check_pickle(pickled)


def as_torch_zip(path: Path, pickled: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    return path


def hanging(place: str) -> bytes:
    """A pickle of a few hundred bytes, with a tuple doubled forty times at a place."""
    bomb = doubled(40)
    if place == "member of a set":
        return b"\x80\x04\x8f(" + pickle.dumps(bomb, 4)[2:-1][9:] + b"\x90."
    # Written by hand: to make such a dictionary would take for ever as well.
    body = pickle.dumps(bomb, 2)[2:-1]
    pair = body + b"K\x01" if place == "key" else b"X\x01\x00\x00\x00a" + body
    return b"\x80\x02}" + pair + b"s."


READ_EACH = """
import sys
from ddetr_mm.weights.safe_read import WeightsError, read_raw
for path in sys.argv[1:]:
    try:
        read_raw(path)
    except WeightsError as error:
        print(path, error, flush=True)
"""


def test_files_that_would_hang_their_reader_are_refused_at_once(tmp_path):
    """In a process of its own with a limit of time, which the first file that hangs would reach."""
    paths = []
    for place in ("key", "value", "member of a set"):
        paths += [as_torch_zip(tmp_path / f"{place}.pth", hanging(place)), tmp_path / f"{place}.pkl"]
        paths[-1].write_bytes(hanging(place))
    command = [sys.executable, "-c", READ_EACH, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    assert [str(path) for path in paths if not any(line.startswith(str(path)) for line in lines)] == []
    assert done.stdout.count("do not trust") == len(paths)


def test_the_older_format_of_torch_is_checked_too(tmp_path):
    path = tmp_path / "old.pth"
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(2), "more": doubled(40)}, buffer, _use_new_zipfile_serialization=False)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(WeightsError, match="far more values"):
        read_raw(path)
    assert os.path.getsize(path) < 5000
