"""Commands of a spec do not load transformers; whoever imports it afterwards gets it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper

from ddetr_mm.compat import patches
from ddetr_mm.compat.patches import MAX_IMAGE_PIXELS, OPENCV_VARIABLE, size_refused, without_language_models

# ---  ---

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def lines():
    """Messages that get through to the handlers of mmengine's current logger."""
    logger = MMLogger.get_current_instance()
    got = []

    class Collector(logging.Handler):
        def emit(self, record):
            got.append((record.levelname, record.getMessage()))

    handler = Collector()
    level = logger.level
    logger.setLevel("INFO")
    logger.addHandler(handler)
    yield got
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def unmended(monkeypatch):
    """mmengine as it comes, restored afterwards."""
    call = DefaultOptimWrapperConstructor.__call__
    monkeypatch.setattr(DefaultOptimWrapperConstructor, "__call__", getattr(call, "__wrapped__", call))


def is_fork():
    """Whether mmengine is the maintained fork."""
    return any(name == "onedl-mmengine" for name in packages_distributions()["mmengine"])


def half_frozen():
    model = torch.nn.Sequential()
    model.add_module("backbone", torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))
    model.add_module("head", torch.nn.Linear(2, 1))
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    return model


SETTINGS = {
    "type": "OptimWrapper",
    "optimizer": {"type": "SGD", "lr": 0.1},
    "paramwise_cfg": {"custom_keys": {"backbone": {"lr_mult": 0.1}}},
}


def test_mmengine_alone_warns_of_every_parameter(unmended, lines):
    """The mend can go when this fails."""
    build_optim_wrapper(half_frozen(), dict(SETTINGS))
    assert len([text for level, text in lines if level == "WARNING" and "is skipped" in text]) == 4


def test_frozen_parameters_are_told_in_one_line(unmended, lines):
    patches.quiet_frozen_parameter_warnings()
    patches.quiet_frozen_parameter_warnings()
    wrapper = build_optim_wrapper(half_frozen(), dict(SETTINGS))
    assert lines == [
        ("INFO", "4 frozen parameters stay out of the optimizer: backbone.0 (2), backbone.1 (2)"),
    ]
    assert len(wrapper.optimizer.param_groups) == 2


def test_other_messages_pass_and_nothing_stays_filtered(lines):
    logger = MMLogger.get_current_instance()
    with patches.frozen_parameters_in_one_line():
        logger.warning("loss is nan")
    logger.warning("a.b is skipped since its requires_grad=False")
    assert lines == [("WARNING", "loss is nan"), ("WARNING", "a.b is skipped since its requires_grad=False")]


def test_filter_goes_when_building_fails(lines):
    logger = MMLogger.get_current_instance()
    before = list(logger.filters)
    with pytest.raises(RuntimeError), patches.frozen_parameters_in_one_line():
        raise RuntimeError
    assert logger.filters == before


def test_names_are_summed_up_by_their_first_parts():
    names = ["a.b.c", "a.b.d", "a.x", *(f"m{i}.w" for i in range(9))]
    assert patches.summarise_names(names, limit=3) == "a.b (2), a.x (1), m0.w (1) and 8 more groups"
    assert patches.summarise_names(["w"]) == "w (1)"


def test_mmengine_loads_its_own_checkpoint_with_the_protection_on(tmp_path):
    """In a process of its own, since what torch has been told cannot be asked back singly."""
    code = f"""
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import load_checkpoint, save_checkpoint
path = {str(tmp_path / "epoch_1.pth")!r}
history = HistoryBuffer([1.0, 3.0], [1, 1])
state = torch.nn.Linear(2, 1).state_dict()
save_checkpoint({{"state_dict": state, "message_hub": {{"loss": history}}}}, path)
try:
    load_checkpoint(torch.nn.Linear(2, 1), path)
    print("told: loaded without the mend")
except Exception as error:
    print("told:", type(error).__name__)
from ddetr_mm.compat.patches import allow_mmengine_checkpoint_classes
allow_mmengine_checkpoint_classes()
print("told:", load_checkpoint(torch.nn.Linear(2, 1), path)["message_hub"]["loss"].mean())
torch.save(print, path)
for load in (torch.load, lambda path: load_checkpoint(torch.nn.Linear(2, 1), path)):
    try:
        load(path)
        print("told: the protection is off")
    except Exception as error:
        print("told:", type(error).__name__)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    told = [line for line in answer.stdout.splitlines() if line.startswith("told:")]
    # The fork needs no mend for its own classes, but one that keeps the protection on.
    unmended = "told: loaded without the mend" if is_fork() else "told: UnpicklingError"
    refused = "told: UnpicklingError"
    assert told == [unmended, "told: 2.0", refused, refused], answer.stderr


# --- The limit on the pixels of an image ---


def test_sizes():
    assert size_refused(10_000, 10_000) is None
    assert size_refused(30_000, 30_000) == (
        "has 30000 x 30000 pixels, more than the 178,956,970 that are decoded"
    )


def test_it_is_where_pillow_suspects_an_attack():
    from PIL import Image

    assert MAX_IMAGE_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_opencv_gets_it_from_the_import_and_a_users_own_stays():
    code = f"import ddetr_mm, os; print(os.environ[{OPENCV_VARIABLE!r}])"
    for given, expected in (({}, str(MAX_IMAGE_PIXELS)), ({OPENCV_VARIABLE: "5000"}, "5000")):
        environment = {name: value for name, value in os.environ.items() if name != OPENCV_VARIABLE}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **given},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout.strip() == expected, done.stderr


# --- Commands of a spec do not load transformers; whoever imports it afterwards gets it ---

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
