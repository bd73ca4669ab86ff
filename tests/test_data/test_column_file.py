"""Columns in a mapped file."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ddetr_mm.data.column_file import DamagedFile, map_columns, write_columns

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
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
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
        {"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 1 << 40]}},
        {"a": {"dtype": "I64", "shape": [-1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "I64", "shape": [1 << 62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}},
        {"a": 3},
        [],
    ],
)
def test_headers_that_lie(tmp_path, header):
    if isinstance(header, dict):
        header["__metadata__"] = {"checksums": json.dumps({"a": 0})}
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(DamagedFile):
        map_columns(tmp_path / "x", verify=False)


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
