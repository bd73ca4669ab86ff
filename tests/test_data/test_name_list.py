import os
import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddetr_mm.data import name_list
from ddetr_mm.data.name_list import NameList

names = st.lists(st.binary(min_size=1, max_size=9).filter(lambda name: b"\0" not in name))


def as_list(names):
    return names.part(0, len(names))


@given(names)
def test_names_come_back_as_the_file_system_knows_them(found):
    assert [os.fsencode(name) for name in as_list(NameList.of(iter(found)))] == found


def test_parts_are_collected_in_batches(monkeypatch):
    monkeypatch.setattr(name_list, "_NAMES_AT_ONCE", 3)
    names = NameList.of(f"{number}{'x' * number}".encode() for number in range(10))
    assert as_list(names) == [f"{number}{'x' * number}" for number in range(10)]
    assert as_list(names.map(lambda name: name[:1])) == list("0123456789")
    assert names.part(8, 20) == ["8xxxxxxxx", "9xxxxxxxxx"]


def test_folders_are_sorted_and_filtered(tmp_path):
    for name in ("b.jpg", "a.jpg", "ü.jpg", "c.png", "10.jpg", "9.jpg"):
        (tmp_path / name).touch()
    names = NameList.of_folder(tmp_path, lambda name: name.endswith(b".jpg"))
    assert as_list(names) == ["10.jpg", "9.jpg", "a.jpg", "b.jpg", "ü.jpg"]


def test_an_empty_folder(tmp_path):
    names = NameList.of_folder(tmp_path, lambda name: True)
    assert len(names) == 0
    assert as_list(names) == []
    assert names.first_of_each().shape == (0,)


@given(names)
def test_first_of_each(found):
    kept = NameList.of(found).take(NameList.of(found).first_of_each())
    assert [os.fsencode(name) for name in as_list(kept)] == list(dict.fromkeys(found))


@given(names, names)
def test_missing(found, others):
    mask = NameList.of(found).missing_in(NameList.of(others))
    assert mask.tolist() == [name not in others for name in found]


def test_positions_and_masks():
    names = NameList.of([b"a", b"b", b"c"])
    assert as_list(names.take(np.array([2, 0, 0]))) == ["c", "a", "a"]
    assert as_list(names.take(np.array([True, False, True]))) == ["a", "c"]


def test_a_name_takes_few_bytes():
    tracemalloc.start()
    names = NameList.of(f"frame_{number:07d}.jpg".encode() for number in range(300_000))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(names) == 300_000
    assert kept < 20 * 300_000
    assert peak < 60 * 300_000
