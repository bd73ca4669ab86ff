"""Config text: it must read back as the same data and stay readable."""

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config

from ddetr_mm.compat.config_text import LINE_LENGTH, ConfigDraft, Reference, config_text, format_value

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def evaluate(source: str):
    """Read literals and ``dict(...)`` calls, nothing else."""

    def value(node):
        if isinstance(node, ast.Call):
            assert node.func.id == "dict" and not node.args
            return {keyword.arg: value(keyword.value) for keyword in node.keywords}
        if isinstance(node, ast.Dict):
            return {
                ast.literal_eval(key): value(item) for key, item in zip(node.keys, node.values, strict=True)
            }
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [value(item) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        return ast.literal_eval(node)

    return value(ast.parse(source, mode="eval").body)


@given(plain)
def test_text_reads_back_as_the_same_data(data):
    assert evaluate(format_value(data)) == data


def test_short_data_stays_on_one_line_and_long_data_wraps():
    assert format_value(dict(type="GN", num_groups=32)) == "dict(type='GN', num_groups=32)"
    long = format_value({f"key_{number}": number for number in range(40)})
    assert max(map(len, long.splitlines())) <= LINE_LENGTH
    assert long.splitlines()[1] == "    key_0=0,"


def test_keys_that_are_no_identifiers_use_braces():
    assert format_value({"backbone.0": 1}) == "{'backbone.0': 1}"
    assert format_value({"class": 1}) == "{'class': 1}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_python_cannot_spell_are_refused(value):
    with pytest.raises(ValueError, match="cannot be written"):
        format_value(value)


def test_no_text_of_a_spec_becomes_code(tmp_path):
    # mmengine replaces {{...}} in a config's source before it runs it, quotes and all.
    texts = [
        "{{$NOT_SET:1}}",
        "{{ fileDirname }}",
        """\"'{{$NOT_SET:b'}}""",
        "{{{$NOT_SET:'}}",
        "+__import__('pathlib').Path('touched').touch()#",
    ]
    draft = ConfigDraft()
    draft.add("texts", texts)
    draft.add("by_name", {text: text for text in texts})
    config = tmp_path / "config.py"
    title = ["a title\nimport pathlib; pathlib.Path('touched').touch()", *texts]
    config.write_text(config_text(draft, title=title, describe=lambda key: texts[0] + "\n1/0"))
    read = Config.fromfile(str(config))
    assert list(read.texts) == texts and dict(read.by_name) == {text: text for text in texts}
    assert not (Path.cwd() / "touched").exists()


def test_objects_are_refused():
    with pytest.raises(TypeError, match="plain data, not set"):
        format_value({1})


def test_sections_carry_remarks_and_sources():
    draft = ConfigDraft()
    draft.add("model", dict(type="A"), ("model.backbone",), remark="The network.")
    text = config_text(draft, title=["Title"], describe=lambda key: f"{key} = 'x' (line 3)")
    assert text == "# Title\n\n# The network.\n#   model.backbone = 'x' (line 3)\nmodel = dict(type='A')\n"


def test_a_section_is_written_once():
    draft = ConfigDraft()
    draft.add("model", {})
    with pytest.raises(ValueError, match="twice"):
        draft.add("model", {})


def test_a_reference_is_written_as_a_name_and_resolves_to_a_copy():
    draft = ConfigDraft()
    draft.add("pipeline", [dict(type="Load")])
    draft.add("loader", dict(dataset=dict(pipeline=Reference("pipeline"))))
    assert "loader = dict(dataset=dict(pipeline=pipeline))" in config_text(draft)
    data = draft.to_dict()
    assert data["loader"]["dataset"]["pipeline"] == [dict(type="Load")]
    assert data["loader"]["dataset"]["pipeline"] is not data["pipeline"]
