"""JSON that is nested thousands of levels deep: one message, wherever it is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_input_project import assert_told, run_here

from ddetr_mm.classes import read_class_map
from ddetr_mm.datasets.coco_json import parse_categories, parse_coco_json
from ddetr_mm.errors import DataError
from ddetr_mm.files import parse_json

DEEP = {depth: ('{"a":' * depth + "1" + "}" * depth) for depth in (2000, 100_000)}
SPEC = ("-e", "spec.yaml")


def with_deep_key(text: str, depth: int) -> str:
    """The same document with a key that nothing reads, in front."""
    return text.replace("{", '{"ignored": ' + DEEP[depth] + ", ", 1)


@pytest.mark.parametrize("depth", DEEP)
@pytest.mark.parametrize("read", [parse_coco_json, parse_categories])
def test_a_key_that_nothing_reads(read, depth):
    text = '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}'
    with pytest.raises(DataError, match="nested too deep"):
        read(with_deep_key(text, depth).encode(), Path("x.json"))


@pytest.mark.parametrize("depth", DEEP)
def test_class_maps_and_other_json(depth, tmp_path):
    path = tmp_path / "names.json"
    path.write_text(DEEP[depth])
    with pytest.raises(DataError, match="nested too deep"):
        read_class_map(path, where="classmap")
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json(DEEP[depth])


COMMANDS = {
    "check": ("check", *SPEC, "--quick"),
    "train": ("train", *SPEC),
    "evaluate": ("evaluate", *SPEC, "evaluate.checkpoint=random.pth"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_so(command, own_project):
    (path,) = (own_project / "coco/val").glob("*.json")
    path.write_text(with_deep_key(path.read_text(), 2000))
    assert_told(run_here(own_project, *COMMANDS[command]), path.name, "nested too deep")


def test_an_export_goes_on_without_that_data(own_project):
    (path,) = (own_project / "coco/val").glob("*.json")
    path.write_text(with_deep_key(path.read_text(), 2000))
    ended = run_here(own_project, "export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=x.onnx")
    assert ended.status == 0 and "nested too deep" in ended.message, ended.message
