"""Settings out of config text, which is never run."""

import pytest

from ddetr_mm.weights.config_text import model_settings


def test_literals_and_dict_calls_are_read():
    text = """
lr = 0.1
model = dict(
    type='TAODeformableDETR', with_box_refine=True, num_queries=300, offset=-0.5,
    neck=dict(in_channels=[512, 1024], norm_cfg={'type': 'GN'}), sizes=(1, 2))
"""
    settings = model_settings(text)
    assert settings["type"] == "TAODeformableDETR" and settings["with_box_refine"] is True
    assert settings["neck"] == {"in_channels": [512, 1024], "norm_cfg": {"type": "GN"}}
    assert settings["offset"] == -0.5 and settings["sizes"] == [1, 2]


@pytest.mark.parametrize(
    "text", ["", "model = (", "x = 1", "model = 3", None, 7, "model = dict(" * 5000, "model: dict = {}"]
)
def test_anything_else_gives_nothing(text):
    assert model_settings(text) == {}


def test_nothing_is_executed(tmp_path):
    target = tmp_path / "made"
    text = f"import os\nos.system('touch {target}')\nmodel = dict(a=open({str(target)!r}, 'w'), b=1)\n"
    assert model_settings(text) == {"a": None, "b": 1}
    assert not target.exists()
