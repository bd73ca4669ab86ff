"""Random specs: valid ones come back unchanged, and no junk raises anything but SpecError."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddetr_mm.errors import SpecError
from ddetr_mm.spec import SUBTASKS, ExperimentSpec, get_field, iter_fields, load_spec, spec_to_yaml
from ddetr_mm.spec.describe import FieldInfo
from ddetr_mm.spec.fields import Kind, SchemaField, all_paths, fields_of
from ddetr_mm.spec.rules import RULES
from ddetr_mm.spec.yaml_source import SpecDumper

QUIET = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
# A null character is refused: no path and no name can hold one. Blank text counts as not given.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20).filter(
    lambda text: "${" not in text and text.strip(" ") not in ("", "???")
)
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["???", "${model.num_queries}", "${", "${x}", "1e400", "0x" + "f" * 99, "~", "[", "\\${a}"]
    ),
)
NAMES = sorted({path.rpartition(".")[2] for path in all_paths(ExperimentSpec)})
RULED = {path for one in RULES for path in one.reads}


def schema_field(path: str) -> SchemaField:
    part: Any = ExperimentSpec
    *above, last = path.split(".")
    for step in above:
        part = fields_of(part)[step].base
    return fields_of(part)[last]


def scalars(one: SchemaField) -> st.SearchStrategy[Any]:
    """Values of a field (or its items) that lie in its range."""
    if one.options:
        return st.sampled_from(one.options)
    if one.pattern:
        return st.from_regex(rf"\A(?:{one.pattern})\Z").filter(
            lambda text: "${" not in text and "\0" not in text
        )
    if one.base is bool:
        return st.booleans()
    if one.base is int:
        return st.integers(int(one.ge or 0), 10**6 if one.le is None else int(one.le))
    if one.base is float:
        low = one.ge if one.ge is not None else one.gt if one.gt is not None else -1e6
        high = one.le if one.le is not None else one.lt if one.lt is not None else 1e6
        return st.floats(low, high, exclude_min=one.gt is not None, exclude_max=one.lt is not None)
    return WORDS


def values(info: FieldInfo) -> st.SearchStrategy[Any]:
    one = schema_field(info.path)
    if one.kind is Kind.SCALARS:
        found: st.SearchStrategy[Any] = st.lists(scalars(one), min_size=1, max_size=4)
    elif one.kind is Kind.MAPPING:
        items = (
            WORDS
            if one.base is str
            else st.recursive(
                st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-1, 1), WORDS),
                lambda inner: st.one_of(
                    st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)
                ),
                max_leaves=5,
            )
        )
        found = st.dictionaries(WORDS, items, max_size=3)
    else:
        found = scalars(one)
    return st.one_of(st.none(), found) if one.optional else found


FREE = [
    info
    for info in iter_fields("train")
    if info.path not in RULED
    and "data_sources" not in info.path
    and "quantize.layers" not in info.path
    and "automl.parameters" not in info.path
    and not info.path.endswith(("num_gpus", "gpu_ids"))
]


@st.composite
def valid_settings(draw: st.DrawFn) -> dict[str, Any]:
    """Dotted path → value for some of the fields no rule reads."""
    chosen = draw(st.lists(st.sampled_from(FREE), max_size=12, unique_by=lambda info: info.path))
    return {info.path: draw(values(info)) for info in chosen}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        part = tree
        for step in above:
            part = part.setdefault(step, {})
        part[last] = value
    return tree


def load_text(text: str | bytes, overrides: list[str] | None = None, subtask: str | None = None):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        return load_spec(path, overrides or [], subtask)


@QUIET
@given(valid_settings())
def test_valid_specs_are_read_as_meant_and_come_back(flat: dict[str, Any]):
    loaded = load_text(yaml.dump(nested(flat), Dumper=SpecDumper, allow_unicode=True))
    for path, value in flat.items():
        assert get_field(loaded.spec, path) == value, path
    loaded.spec.encryption_key = loaded.spec.ddetr_mm.automl.storage = None  # never written
    assert load_text(spec_to_yaml(loaded.spec)).spec == loaded.spec


@QUIET
@given(valid_settings())
def test_overrides_mean_the_same_as_the_file(flat: dict[str, Any]):
    overrides = []
    for path, value in flat.items():
        text = yaml.dump([value], Dumper=SpecDumper, default_flow_style=True, width=10**6).strip()[1:-1]
        overrides.append(f"{path}={text}")
    assert load_text("", overrides).spec == load_text(yaml.dump(nested(flat), Dumper=SpecDumper)).spec


def refuse_or_load(text: str | bytes, overrides: list[str], subtask: str | None) -> None:
    """Nothing but SpecError may come out, and that must be printable."""
    try:
        load_text(text, overrides, subtask)
    except SpecError as error:
        assert str(error)
        assert error.problems


trees = st.recursive(
    JUNK,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(max_size=5)), inner, max_size=5),
    ),
    max_leaves=25,
)
subtasks = st.sampled_from([None, *SUBTASKS])


@QUIET
@given(st.one_of(st.text(max_size=200), st.binary(max_size=200)), subtasks)
def test_junk_text(text: str | bytes, subtask: str | None):
    refuse_or_load(text, [], subtask)


@QUIET
@given(st.text(alphabet="ab:-[]{},#&*!|>'\"%@`?<~ \n\t.0123456789e$", max_size=80), subtasks)
def test_junk_of_yaml_characters(text: str, subtask: str | None):
    refuse_or_load(text, [], subtask)


@settings(QUIET, max_examples=100)
@given(st.dictionaries(st.sampled_from(NAMES), trees, max_size=5), subtasks)
def test_junk_in_the_right_places(tree: dict[str, Any], subtask: str | None):
    refuse_or_load(yaml.safe_dump(tree), [], subtask)


@settings(QUIET, max_examples=100)
@given(
    st.dictionaries(st.sampled_from([info.path for info in iter_fields("train")]), JUNK, max_size=6), subtasks
)
def test_junk_values_of_real_fields(flat: dict[str, Any], subtask: str | None):
    plain = {path: value for path, value in flat.items() if "[]" not in path}
    tree: dict[str, Any] = {}
    for path, value in plain.items():
        *above, last = path.split(".")
        part = tree
        for step in above:
            below = part.setdefault(step, {})
            part = below if isinstance(below, dict) else {}
        part[last] = value
    refuse_or_load(yaml.safe_dump(tree), [], subtask)


paths = st.one_of(
    st.sampled_from([path.replace("[]", "[0]") for path in all_paths(ExperimentSpec)]),
    st.text(alphabet="ab.[]0~+=", max_size=12),
    st.lists(st.sampled_from([*NAMES, "0", "7"]), max_size=4).map(".".join),
)


@settings(QUIET, max_examples=100)
@given(st.lists(st.tuples(paths, st.one_of(JUNK.map(str), st.text(max_size=30))), max_size=5), subtasks)
def test_junk_overrides(pairs: list[tuple[str, str]], subtask: str | None):
    base = (
        "dataset: {train_data_sources: {image_dir: a, json_file: b}}\nddetr_mm: {backbone: {type: X, a: [1]}}"
    )
    refuse_or_load(base, [f"{path}={value}" for path, value in pairs], subtask)


@QUIET
@given(st.lists(st.text(max_size=30), max_size=4))
def test_junk_arguments(arguments: list[str]):
    refuse_or_load("", arguments, None)


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"key{n}: {n}" for n in range(9000)),
        "train: {freeze: [" + ",".join(["a"] * 9000) + "]}",
        "wandb: {name: '" + "\\" * 200_000 + "x${a}'}",
        "wandb: {name: '" + "${" * 100_000 + "'}",
        "inference: {color_map: {" + ", ".join(f"'{n}': '{'${wandb.name}' * 90}'" for n in range(190)) + "}}",
        "train: {seed: " + "9" * 900_000 + "}",
    ],
    ids=["unknown keys", "long list", "backslashes", "openings", "many interpolations", "digits"],
)
def test_large_inputs_are_refused_or_loaded(text: str):
    refuse_or_load(text, [], None)
