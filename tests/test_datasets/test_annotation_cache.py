"""One parse and one copy of the annotations a machine, in a mapped file."""

import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from data_builders import box, coco, image, three_images, write_json
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ddetr_mm.datasets import annotation_cache, sources
from ddetr_mm.datasets.annotation_cache import (
    DamagedFile,
    MappedCocoTable,
    cache_folders,
    map_columns,
    write_columns,
)
from ddetr_mm.datasets.sources import read_coco_sources
from ddetr_mm.errors import DataError

# --- the cache ---


@pytest.fixture
def json_file(tmp_path):
    return write_json(tmp_path / "a.json", three_images())


def read(path, **options):
    return read_coco_sources([{"image_dir": "x", "json_file": str(path)}], storage="shared", **options)


@pytest.fixture
def parsed(monkeypatch):
    """The names of all files that were parsed."""
    names = []
    real = sources._parse_file

    def counting(path, with_masks):
        names.append(path.name)
        return real(path, with_masks)

    monkeypatch.setattr(sources, "_parse_file", counting)
    return names


def assert_same(one, other):
    for name in one.array_names():
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert dict(one.category_names) == dict(other.category_names)


def test_the_second_start_parses_nothing(json_file, parsed):
    first, second = read(json_file), read(json_file)
    assert parsed == ["a.json"]
    assert isinstance(second, MappedCocoTable)
    assert_same(first, second)
    assert_same(second, read_coco_sources([{"image_dir": "x", "json_file": json_file}]))
    assert second.notes == first.notes


def test_columns_lie_in_the_file_and_not_on_the_heap(json_file):
    table = read(json_file)
    for name in table.array_names():
        column = getattr(table, name)
        assert not column.flags.writeable or column.size == 0


def test_pickles_carry_the_path_and_not_the_columns(tmp_path):
    boxes = [box(index, 1, [1, 1, 5, 5]) for index in range(5000)]
    table = read(write_json(tmp_path / "a.json", coco([image(1)], boxes)))
    pickled = pickle.dumps(table)
    assert len(pickled) < 500
    assert_same(pickle.loads(pickled), table)


def test_a_changed_file_is_parsed_anew(json_file, parsed):
    read(json_file)
    document = three_images()
    document["annotations"][0]["bbox"][0] = 3
    write_json(json_file, document)
    assert read(json_file).boxes_xywh[0, 0] == 3
    assert parsed == ["a.json"] * 2


def test_a_change_that_keeps_size_and_time_is_noticed(json_file, monkeypatch):
    monkeypatch.setattr(annotation_cache, "_SETTLED_NS", -1)  # the digest is remembered at once
    read(json_file)
    state = json_file.stat()
    json_file.write_text(json_file.read_text().replace("[1, 2, 10, 20]", "[3, 2, 10, 20]"))
    os.utime(json_file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert json_file.stat().st_size == state.st_size
    assert read(json_file).boxes_xywh[0, 0] == 3


def test_the_same_content_elsewhere_is_known(json_file, tmp_path, parsed):
    read(json_file)
    copy = tmp_path / "copy.json"
    copy.write_bytes(json_file.read_bytes())
    read(copy)
    assert parsed == ["a.json"]


def test_digests_of_settled_files_are_remembered(json_file, monkeypatch):
    monkeypatch.setattr(annotation_cache, "_SETTLED_NS", -1)
    read(json_file)
    monkeypatch.setattr(annotation_cache, "_stream_digest", None)  # would fail when called
    assert read(json_file).num_images == 3


def test_digests_of_files_just_written_are_not(json_file, cache_folder):
    read(json_file)
    assert not list(cache_folder.glob("*.digest"))


def test_a_damaged_digest_is_computed_anew(json_file, cache_folder, monkeypatch):
    monkeypatch.setattr(annotation_cache, "_SETTLED_NS", -1)
    read(json_file)
    (memory,) = cache_folder.glob("*.digest")
    memory.write_text("{")
    assert read(json_file).num_images == 3
    assert json.loads(memory.read_text())["identity"][0] == json_file.stat().st_size


def test_options_and_sources_have_their_own_copies(json_file, tmp_path, parsed):
    read(json_file)
    read(json_file, with_masks=True)
    other = write_json(tmp_path / "b.json", coco([image(7)], []))
    pair = [{"image_dir": "x", "json_file": path} for path in (json_file, other)]
    assert read_coco_sources(pair, storage="shared").num_images == 4
    assert read_coco_sources(pair[::-1], storage="shared").original_image_ids.tolist() == [7, 7, 3, 5]
    assert len(parsed) == 6


def test_what_may_not_be_is_refused_from_the_cache_too(tmp_path):
    sources = [{"image_dir": "x", "json_file": write_json(tmp_path / "a.json", coco([image(1)], []))}]
    write_json(tmp_path / "a.json", coco([image(1)], [box(1, 2, [0, 0, 4, 5])]))
    for _ in range(2):
        assert "left out: 1" in read_coco_sources(sources, storage="shared").repairs[0]
        with pytest.raises(DataError, match=r"annotations\[0\].image_id"):
            read_coco_sources(sources, storage="shared", strict=True)
    document = coco([image(1)], [])
    del document["annotations"]
    write_json(tmp_path / "a.json", document)
    assert read_coco_sources(sources, storage="shared", annotations_required=False).num_images == 1
    with pytest.raises(DataError, match="no annotations"):
        read_coco_sources(sources, storage="shared")


@pytest.mark.parametrize("damage", ["cut", "altered", "emptied", "another version"])
def test_a_damaged_cache_is_rebuilt(json_file, cache_folder, parsed, damage, caplog):
    expected = read_coco_sources([{"image_dir": "x", "json_file": json_file}])
    read(json_file)
    (path,) = cache_folder.glob("*.columns")
    content = path.read_bytes()
    changed = {
        "cut": content[:-5],
        "altered": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
        "emptied": b"",
        "another version": content.replace(b'"version": "3"', b'"version": "0"'),
    }[damage]
    assert changed != content
    path.unlink()
    path.write_bytes(changed)
    assert_same(read(json_file), expected)
    assert len(parsed) == 3
    assert "parsed again" in caplog.text
    assert_same(read(json_file), expected)
    assert len(parsed) == 3


def test_wrong_annotations_leave_nothing(tmp_path, cache_folder):
    path = write_json(tmp_path / "a.json", "{")
    for _ in range(2):
        with pytest.raises(DataError, match="byte"):
            read(path)
    assert not list(cache_folder.glob("*.columns"))


def test_a_folder_that_cannot_be_written_falls_back(json_file, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDETR_MM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(annotation_cache.tempfile, "gettempdir", lambda: str(tmp_path / "temp"))
    table = read(json_file)
    assert table.path.is_relative_to(tmp_path / "temp")
    assert "cannot be shared" in caplog.text


def test_nowhere_to_write_keeps_the_table_in_memory(json_file, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DDETR_MM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(annotation_cache.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    table = read(json_file)
    assert not isinstance(table, MappedCocoTable)
    assert table.num_images == 3


def test_a_full_disk_keeps_the_table_in_memory(json_file, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(annotation_cache, "save_table", full)
    assert read(json_file).num_images == 3
    assert "No space left" in caplog.text


def test_temporary_folders_of_others_are_refused(json_file, tmp_path, monkeypatch):
    monkeypatch.setattr(annotation_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_folders()[1]
    folder.mkdir()
    uid = os.getuid()
    monkeypatch.setattr(annotation_cache.os, "getuid", lambda: uid + 1)
    with pytest.raises(PermissionError):
        annotation_cache._make_folder(folder)


@pytest.mark.parametrize("to", ["folder", "nowhere"])
def test_a_link_in_the_cache_folders_place_is_not_followed(to, json_file, tmp_path, monkeypatch, caplog):
    (tmp_path / "folder").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "annotations").symlink_to(tmp_path / to)
    monkeypatch.setenv("DDETR_MM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    table = read(json_file)
    assert table.num_boxes == 4 and table.path.is_relative_to(tmp_path / "temporary")
    assert [*(tmp_path / "folder").iterdir()] == []


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("DDETR_MM_CACHE", "/a")
    assert str(cache_folders()[0]) == "/a/annotations"
    monkeypatch.delenv("DDETR_MM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(cache_folders()[0]) == "/b/ddetr_mm/annotations"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert str(cache_folders()[0]) == "/c/.cache/ddetr_mm/annotations"


def test_only_the_caches_own_unused_files_are_removed(json_file, cache_folder, monkeypatch):
    monkeypatch.setattr(annotation_cache, "_SETTLED_NS", 0)
    cache_folder.mkdir(parents=True)
    read(json_file)  # a file, a digest and a lock of ours
    own = sorted(path for path in cache_folder.iterdir())
    assert {path.suffix for path in own} == {".columns", ".digest", ".lock"}
    names = ("instances_train2017.json", "0" * 32 + ".columns", ".tmp-1-x.columns", "1" * 32 + ".lock")
    kept = [cache_folder / name for name in names]
    for path in kept:
        path.write_text("mine")
    unfinished = cache_folder / ".ddetr_mm-0123456789abcdef.tmp.columns"
    unfinished.write_bytes(b"half a file")
    (cache_folder / ("2" * 32 + ".columns")).mkdir()
    (cache_folder / ("3" * 32 + ".columns")).symlink_to(own[0])
    for path in [*own, *kept]:
        os.utime(path, (0, 0))
    second = json_file.with_name("second.json")
    second.write_text(json_file.read_text() + " ")
    assert type(read(second)).__name__ == "MappedCocoTable"
    assert not any(path.exists() for path in own) and not unfinished.exists()
    assert all(path.read_text() == "mine" for path in kept)
    assert (cache_folder / ("2" * 32 + ".columns")).is_dir()


def test_a_vanished_file_is_reported_to_the_worker(json_file):
    table = read(json_file)
    pickled = pickle.dumps(table)
    table.path.unlink()
    with pytest.raises(DataError, match="vanished"):
        pickle.loads(pickled)


def _read_many(path, out):
    logging.disable()
    table = read(path)
    out.put((type(table).__name__, table.num_boxes, os.getpid()))


def test_many_processes_at_once_build_one_file(json_file, cache_folder):
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    workers = [context.Process(target=_read_many, args=(json_file, out)) for _ in range(6)]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert {item[:2] for item in found} == {("MappedCocoTable", 4)}
    assert len(list(cache_folder.glob("*.columns"))) == 1


KILLED = """
import sys, time
from ddetr_mm.datasets import annotation_cache
real = annotation_cache.write_columns
def slow(path, columns, metadata):
    with annotation_cache.written_whole(path, owned=False) as temporary:
        temporary.write_bytes(b"half a file")
        print("writing", flush=True)
        time.sleep(60)
annotation_cache.write_columns = slow
from ddetr_mm.datasets.sources import read_coco_sources
read_coco_sources([{"image_dir": "x", "json_file": sys.argv[1]}], storage="shared")
"""


def test_a_writer_killed_at_work_blocks_nobody(json_file, cache_folder):
    """SIGKILL while the file is half written: the lock is free, the half file is no cache."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(json_file)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(signal.SIGKILL)
    assert len(list(cache_folder.glob(".ddetr_mm-*.tmp*"))) == 1
    assert read(json_file).num_boxes == 4


# --- columns in a mapped file ---

COLUMNS = {
    "ids": np.array([5, -7, 2**62], np.int64),
    "sizes_hw": np.array([[1, 2], [3, 4]], np.int32),
    "flags": np.array([True, False, True]),
    "boxes": np.array([[0.1, 0.2, 0.3, 0.4]]),
    "text": np.frombuffer(b"abc", np.uint8),
    "nothing": np.empty((0, 4)),
}


@pytest.fixture
def path(tmp_path):
    write_columns(tmp_path / "x.columns", COLUMNS, {"names": "ä"})
    return tmp_path / "x.columns"


def test_round_trip(path):
    found = map_columns(path, verify=True)
    assert found.metadata["names"] == "ä"
    assert found.columns.keys() == COLUMNS.keys()
    for name, column in COLUMNS.items():
        np.testing.assert_array_equal(found.columns[name], column)
        assert found.columns[name].dtype == column.dtype


def test_columns_are_read_only_views_of_the_file(path):
    ids = map_columns(path, verify=False).columns["ids"]
    assert not ids.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


dtypes = st.sampled_from([np.bool_, np.uint8, np.int32, np.int64, np.float64])


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5),
        dtypes.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_side=0))),
        max_size=4,
    )
)
def test_round_trip_of_anything(tmp_path_factory, columns):
    path = tmp_path_factory.mktemp("columns") / "x"
    write_columns(path, columns, {})
    found = map_columns(path, verify=True).columns
    assert found.keys() == columns.keys()
    for name, column in columns.items():
        np.testing.assert_array_equal(found[name], column)


@settings(deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("columns") / "x"
    write_columns(path, {"a": np.arange(9)}, {"names": "x"})
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        found = map_columns(path, verify=True)
    except DamagedFile:
        return
    # a byte of the header that changes nothing of the columns
    np.testing.assert_array_equal(found.columns["a"], np.arange(9))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_cut_file_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("columns") / "x"
    write_columns(path, {"a": np.arange(9)}, {})
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(DamagedFile):
        map_columns(path, verify=False)


@pytest.mark.parametrize(
    "header",
    [
        {"shape": (1 << 40,)},
        {"shape": (-1,)},
        {"shape": (1 << 62, 2)},
        {"descr": "|O"},
        {"descr": [("a", "<i8")]},
        {"fortran_order": True},
        {"shape": (2.5,)},
        {},
    ],
)
def test_headers_that_lie(tmp_path, header):
    path = tmp_path / "x"
    head = json.dumps({"metadata": {}, "checksums": {"a": 0}}).encode()
    with path.open("wb") as file:
        np.lib.format.write_array(file, np.frombuffer(head, np.uint8))
        file.write(bytes(-file.tell() % 64))
        if header:
            header = {"descr": "<i8", "fortran_order": False, "shape": (2,)} | header
            np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(16))
    with pytest.raises(DamagedFile):
        map_columns(path, verify=False)


def test_the_reader_takes_what_the_headers_above_differ_from(tmp_path):
    write_columns(tmp_path / "x", {"a": np.arange(2)}, {})
    assert map_columns(tmp_path / "x", verify=True).columns["a"].tolist() == [0, 1]


def test_a_pickle_is_not_executed(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DamagedFile):
        map_columns(tmp_path / "x", verify=True)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        map_columns(tmp_path / "x", verify=True)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="column a is of type object"):
        write_columns(tmp_path / "x", {"a": np.array([object()])}, {})
    assert list(tmp_path.iterdir()) == []
