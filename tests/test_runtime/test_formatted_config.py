"""A config's text is mmengine's, follows every change, and is formatted no more often than needed."""

from __future__ import annotations

import copy

import pytest
from mmengine.config import Config
from yapf.yapflib import yapf_api

from ddetr_mm.runtime.formatted_config import FormattedOnceConfig

CONTENT = "model = dict(type='A', layers=[1, 2])\nload_from = None\n"


@pytest.fixture
def formatted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that have been formatted."""
    texts: list[str] = []
    original = yapf_api.FormatCode

    def counted(text: str, *args, **kwargs):
        texts.append(text)
        return original(text, *args, **kwargs)

    # mmengine takes the name when it is imported, its fork each time that it formats.
    monkeypatch.setattr("mmengine.config.config.FormatCode", counted, raising=False)
    monkeypatch.setattr(yapf_api, "FormatCode", counted)
    return texts


def test_the_text_is_mmengines_and_made_once(formatted):
    plain = Config.fromstring(CONTENT, ".py")
    text = plain.pretty_text
    formatted.clear()
    config = FormattedOnceConfig.of(plain)
    for again in (config, copy.deepcopy(config), config):
        assert again.dump() == again.pretty_text == text
    assert config.filename == plain.filename
    assert len(formatted) == 2  # the deep copy was made before there was a text


def test_a_change_is_seen():
    plain = Config.fromstring(CONTENT, ".py")
    config = FormattedOnceConfig.of(plain)
    before = config.pretty_text
    config.model.layers.append(3)
    config.work_dir = "here"
    assert config.pretty_text != before
    read = Config.fromstring(config.pretty_text, ".py")
    assert read.work_dir == "here" and read.model.layers == [1, 2, 3]
    assert plain.get("work_dir") is None
