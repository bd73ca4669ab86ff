"""Commands of a spec do not load transformers; whoever imports it afterwards gets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ddetr_mm.stack.light_import import without_language_models

SCRIPT = """
import sys
import ddetr_mm.tasks.runner
from mmdet.registry import MODELS
assert not [name for name in sys.modules if name.split(".")[0] == "transformers"]
assert MODELS.get("TAODeformableDETR") and MODELS.get("DINO")
import transformers
assert transformers.AutoTokenizer
"""


def test_a_spec_needs_no_language_models():
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_loaded_stays(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", sys)
    with without_language_models():
        assert sys.modules["transformers"] is sys
    assert sys.modules["transformers"] is sys


def test_it_is_back_after_an_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with pytest.raises(ImportError), without_language_models():
        import transformers  # noqa: F401
    assert "transformers" not in sys.modules
