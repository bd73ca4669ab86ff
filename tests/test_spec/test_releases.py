"""Keys of older and newer releases of TAO: hints, and notes where they change nothing."""

from __future__ import annotations

import pytest

from ddetr_mm.spec.fields import all_paths, field_names
from ddetr_mm.spec.releases import MOVED, NEWER, NOT_HERE, NOT_READ
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec

MOVED_KEYS = [(root, key, new) for root, keys in MOVED.items() for key, new in keys.items()]


@pytest.mark.parametrize(("root", "key", "new"), MOVED_KEYS)
def test_a_moved_key_is_named_with_its_place(problems, root: type, key: str, new: str):
    paths = set(all_paths(root))
    assert new in paths and key not in paths
    subtask = "convert" if root is ConvertSpec else "train"
    (found,) = problems(nested_text(key) + "x", (), subtask, require_mandatory=False)
    assert f"{key}, line" in found and f"did you mean {new}?" in found
    # The same on the command line.
    (found,) = problems("", [f"{key}=x"], subtask, require_mandatory=False)
    assert f"did you mean {new}?" in found


@pytest.mark.parametrize("key", NOT_HERE)
def test_what_is_done_otherwise_is_explained(problems, key: str):
    (found,) = problems(nested_text(key) + "x", (), "train", require_mandatory=False)
    assert NOT_HERE[key] in found


TAO_AUTOML = """
automl:
  automl_enabled: true
  algorithm: bayesian
  parameters: [{name: train.optim.lr, min: "???"}]
  nested: {store: "${no.such.key}"}
train: {num_epochs: 3}
"""


@pytest.mark.parametrize("subtask", ["train", "evaluate", "automl", None])
def test_tao_s_own_automl_section_is_a_note_whatever_it_holds(load, subtask):
    loaded = load(TAO_AUTOML, (), subtask, require_mandatory=False)
    (note,) = [one for one in loaded.notes if one.startswith("automl")]
    assert note == "automl (line 2) is not read: `ddetr-mm automl` reads ddetr_mm.automl"
    assert loaded.spec.train.num_epochs == 3
    assert loaded.spec.ddetr_mm.automl == ExperimentSpec().ddetr_mm.automl
    for text in ("automl:", "automl: {}", "automl: x", "automl: [1, 2]"):
        assert (
            f"automl (line 1) {NOT_READ['automl']}" in load(text, (), subtask, require_mandatory=False).notes
        )


def test_the_note_is_for_the_top_level_of_an_experiment_alone(problems):
    (found,) = problems("train:\n  automl: {a: 1}", (), "train", require_mandatory=False)
    assert "train.automl, line 2" in found and "is not a key of the spec" in found
    (found,) = problems("automl: {a: 1}", (), "convert", require_mandatory=False)
    assert "is not a key of the spec" in found


def test_newer_keys_are_none_of_ours():
    assert not set(NEWER) & {*all_paths(ExperimentSpec), *field_names(ExperimentSpec)}


@pytest.mark.parametrize("key", NEWER)
def test_a_newer_key_is_a_note_at_its_default_and_an_error_elsewhere(load, problems, key: str):
    default = NEWER[key]
    text = str(default).lower() if isinstance(default, bool) else repr(default)
    for given in (text, "~", "''"):
        (note,) = load(nested_text(key) + given, (), "train", require_mandatory=False).notes
        assert key.partition(".")[0] in note and "is a key of a newer TAO at its default: no effect" in note
    found = problems(nested_text(key) + "other", (), "train", require_mandatory=False)
    assert len(found) == 1 and "is not a key of the spec" in found[0]


def nested_text(path: str) -> str:
    """``a.b.c`` as YAML up to the value."""
    *above, last = path.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate([*above, last])]
    return "\n".join(lines) + " "
