"""The schema against TAO's table of fields, and its own consistency."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from ddetr_mm.spec import ConvertSpec, ExperimentSpec, iter_fields
from ddetr_mm.spec.describe import FieldInfo
from ddetr_mm.spec.fields import Kind, Section, field_names, fields_of

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "golden" / "spec_fields.csv"


def field_differences() -> ModuleType:
    """docs/field_differences.py as a module."""
    found = importlib.util.spec_from_file_location(
        "field_differences", ROOT / "docs" / "field_differences.py"
    )
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module  # dataclasses look their module up
    found.loader.exec_module(module)
    return module


LISTED = field_differences()
FIELDS = {info.path: info for info in iter_fields()}
TYPE_WORDS = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "List[int]": "a list of integers",
    "List[float]": "a list of numbers",
    "List[str]": "a list of texts",
    "Dict[str,Any]": "a mapping",
    "Dict[str,str]": "a mapping of names to text",
}
OTHER_TYPES = {
    # Sources are sections of their own here, with the keys that TAO reads from its free mappings.
    "dataset.train_data_sources": "a list of sections: image_dir, json_file, or null",
    "dataset.val_data_sources": "a list of sections: image_dir, json_file, or null",
    "dataset.test_data_sources": "a section: image_dir, json_file, or null",
    "dataset.infer_data_sources": "a section: image_dir, classmap, or null",
    "dataset.infer_data_sources.image_dir": "a list of texts",
    "dataset.infer_data_sources.classmap": "text, or null",
    "dataset.quant_calibration_data_sources": "a section: image_dir, json_file, or null",
    "quantize.layers": "a list of sections: module_name, weights, activations, or null",
    # Null means "not given" for text that has no default, and a dynamic batch for export.
    "evaluate.checkpoint": "text, or null",
    "inference.checkpoint": "text, or null",
    "export.checkpoint": "text, or null",
    "export.onnx_file": "text, or null",
    "export.batch_size": "an integer, or null",
    "gen_trt_engine.onnx_file": "text, or null",
    "gen_trt_engine.tensorrt.calibration.cal_cache_file": "text, or null",
    "convert:results_dir": "text, or null",
    "convert:image_dir_name": "text, or null",
    "convert:label_dir_name": "text, or null",
    "convert:image_extension": "text, or null",
}


def tao_rows() -> list[dict[str, str]]:
    with TABLE.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_every_row_of_tao_is_in_the_schema():
    rows = {row["path"] for row in tao_rows()}
    assert len(rows) == 204
    assert rows - set(FIELDS) == set()
    extra = {path for path in set(FIELDS) - rows if FIELDS[path].origin != "ours"}
    assert extra == set()


def expected_default(row: dict[str, str]) -> Any:
    text = row["default"]
    if text in ("", "???"):
        return None if text == "" else text
    value = yaml.safe_load(text)
    return float(value) if row["type"] == "float" else value


@pytest.mark.parametrize("row", tao_rows(), ids=lambda row: row["path"])
def test_default_is_that_of_tao_or_a_listed_difference(row: dict[str, str]):
    info = FIELDS[row["path"]]
    listed = {one.path: one for one in LISTED.DEFAULTS}.get(row["path"])
    if listed is not None:
        assert listed.schema == expected_default(row)
        assert info.default == listed.ours
        assert listed.ours != listed.schema
    elif row["source"].startswith("free key"):
        assert info.default in ("???", None, "")
    else:
        assert info.default == expected_default(row)


@pytest.mark.parametrize("row", tao_rows(), ids=lambda row: row["path"])
def test_type_is_that_of_tao(row: dict[str, str]):
    info = FIELDS[row["path"]]
    if row["path"] in OTHER_TYPES:
        assert info.type == OTHER_TYPES[row["path"]]
        return
    optional = row["type"].startswith("Optional[")
    bare = row["type"][len("Optional[") : -1] if optional else row["type"]
    if bare.endswith("QuantizationConfig"):
        assert info.type.startswith("a section: dtype")
        return
    assert info.type == TYPE_WORDS[bare] + (", or null" if optional else "")


def range_in_words(row: dict[str, str]) -> str:
    """TAO's bounds in the words of :meth:`SchemaField.bounds`."""
    parts = []
    if row["options"] in ("math_cond: > 0.0", "math_cond: >0", "math_cond: > 0") and row["type"] == "float":
        parts.append("more than 0")
    elif row["valid_min"]:
        parts.append(f"at least {float(row['valid_min']):g}")
    if row["valid_max"] not in ("", "inf"):
        parts.append(f"at most {float(row['valid_max']):g}")
    return ", ".join(parts)


@pytest.mark.parametrize("row", tao_rows(), ids=lambda row: row["path"])
def test_range_is_that_of_tao_or_a_listed_difference(row: dict[str, str]):
    info = FIELDS[row["path"]]
    listed = {one.path: one for one in LISTED.RANGES}.get(row["path"])
    if listed is not None:
        assert info.bounds == listed.ours
        stale = info.bounds == range_in_words(row) and listed.documentation == LISTED.ABSENT
        assert not stale, "no longer a difference: take it off the list"
    else:
        assert info.bounds == range_in_words(row)


@pytest.mark.parametrize("row", tao_rows(), ids=lambda row: row["path"])
def test_options_are_those_of_tao_or_a_listed_difference(row: dict[str, str]):
    info = FIELDS[row["path"]]
    options = "" if row["options"].startswith("math_cond") else row["options"]
    listed = {one.path: one for one in LISTED.OPTIONS}.get(row["path"])
    if listed is None:
        assert set(map(str, info.options or ())) == set(filter(None, options.split(",")))
    elif info.options is not None:
        assert ", ".join(map(str, info.options)) == listed.ours


@pytest.mark.parametrize(
    "table", [LISTED.DEFAULTS, LISTED.RANGES, LISTED.OPTIONS], ids=["defaults", "ranges", "options"]
)
def test_listed_differences_name_fields_once(table):
    paths = [one.path for one in table]
    assert len(set(paths)) == len(paths)
    assert set(paths) <= set(FIELDS)


@pytest.mark.parametrize("info", FIELDS.values(), ids=FIELDS)
def test_every_field_is_documented(info: FieldInfo):
    assert len(info.doc) > 8
    assert info.doc[0].isupper()
    assert info.doc.endswith(".")


@pytest.mark.parametrize("root", [ExperimentSpec, ConvertSpec])
def test_defaults_are_of_their_own_type_and_in_their_own_ranges(root: type[Section]):
    assert root.model_validate(root().model_dump()) == root()


def test_unknown_attributes_are_refused():
    with pytest.raises(ValueError, match="no field"):
        ExperimentSpec().train.num_epoch = 3


def test_aliases_are_names_of_no_other_field():
    def visit(part: type[Section]) -> int:
        fields = fields_of(part).values()
        assert all(one.alias not in fields_of(part) for one in fields)
        assert len(field_names(part)) == len(fields) + sum(one.alias is not None for one in fields)
        below = sum(visit(one.base) for one in fields if one.kind in (Kind.SECTION, Kind.SECTIONS))
        return below + sum(one.alias is not None for one in fields)

    assert visit(ExperimentSpec) == 2


def test_defaults_are_not_shared_between_instances():
    one, other = ExperimentSpec(), ExperimentSpec()
    one.dataset.augmentation.scales.append(1)
    one.train.optim.lr = 1.0
    assert other.dataset.augmentation.scales[-1] == 800
    assert other.train.optim.lr == 2e-4


def test_sections_have_docstrings_and_fields_have_documentation():
    def visit(part: type[Section]) -> int:
        assert issubclass(part, Section)
        assert part.__doc__
        assert part.__doc__ != Section.__doc__
        fields = fields_of(part)
        assert list(fields) == list(part.model_fields)
        assert all(one.doc for one in fields.values())
        below = (one.base for one in fields.values() if one.kind in (Kind.SECTION, Kind.SECTIONS))
        return len(fields) + sum(map(visit, below))

    assert visit(ExperimentSpec) > 150
    assert visit(ConvertSpec) == 16


def test_convert_fields_alone():
    paths = [info.path for info in iter_fields("convert")]
    assert paths[:3] == ["input_source", "data_root", "results_dir"]
    assert "ddetr_mm.strict" in paths
    assert not any(path.startswith("convert:") for path in paths)
