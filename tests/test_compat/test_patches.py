from __future__ import annotations

import argparse
import logging
import os
import pickle
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper

from ddetr_mm.compat import patches
from ddetr_mm.compat.patches import (
    MAX_IMAGE_PIXELS,
    OPENCV_VARIABLE,
    safe_globals,
    size_refused,
)

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
def unpatched(monkeypatch):
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


def test_mmengine_alone_warns_of_every_parameter(unpatched, lines):
    """The patch can go when this fails."""
    build_optim_wrapper(half_frozen(), dict(SETTINGS))
    assert len([text for level, text in lines if level == "WARNING" and "is skipped" in text]) == 4


def test_frozen_parameters_are_logged_in_one_line(unpatched, lines):
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
    """In a process of its own, since torch's safe globals cannot be removed one by one."""
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
    print("result: loaded without the patch")
except Exception as error:
    print("result:", type(error).__name__)
from ddetr_mm.compat.patches import allow_mmengine_checkpoint_classes
allow_mmengine_checkpoint_classes()
print("result:", load_checkpoint(torch.nn.Linear(2, 1), path)["message_hub"]["loss"].mean())
torch.save(print, path)
for load in (torch.load, lambda path: load_checkpoint(torch.nn.Linear(2, 1), path)):
    try:
        load(path)
        print("result: the protection is off")
    except Exception as error:
        print("result:", type(error).__name__)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    results = [line for line in answer.stdout.splitlines() if line.startswith("result:")]
    # The fork loads its own classes without the patch, but with weights_only=False.
    unpatched = "result: loaded without the patch" if is_fork() else "result: UnpicklingError"
    refused = "result: UnpicklingError"
    assert results == [unpatched, "result: 2.0", refused, refused], answer.stderr


# --- the limit on the pixels of an image ---


def test_sizes():
    assert size_refused(10_000, 10_000) is None
    assert size_refused(30_000, 30_000) == (
        "has 30000 x 30000 pixels, more than the 178,956,970 that are decoded"
    )


def test_limit_is_pillows():
    from PIL import Image

    assert MAX_IMAGE_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_import_sets_opencvs_limit_unless_the_user_has():
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


# --- Imports that a spec never uses ---


def test_openmmlab_is_imported_without_transformers_and_matplotlib_until_they_are_wanted():
    code = """
import sys
from ddetr_mm.compat.patches import without_unused_imports
with without_unused_imports():
    import mmdet.datasets, mmdet.models
assert not {"transformers", "torchao", "matplotlib"} & set(sys.modules), sorted(sys.modules)
import mmdet.utils
import numpy
import transformers  # ours and the user's own imports find it
with without_unused_imports():
    from transformers import PretrainedConfig
boxes = numpy.array([[2, 2, 9, 9, 1]])
image = numpy.zeros((20, 20, 3), numpy.uint8)
try:
    assert mmdet.utils.imshow_mot_errors(image, boxes, numpy.array([1]), numpy.array([0])).any()
except ImportError as error:  # mmdet's own function needs it, also to draw by OpenCV
    assert "seaborn" in str(error), error
assert "matplotlib.pyplot" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- classes that torch.load may build ---


def reload(value, path):
    torch.save(value, path)
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path, weights_only=True)


@pytest.mark.usefixtures("kept_safe_globals")
def test_log_history_of_mmengine_comes_back(tmp_path):
    history = HistoryBuffer()
    for value in (1.0, 2.0, 6.0):
        history.update(value)
    again = reload({"loss": history}, tmp_path / "a.pth")["loss"]
    assert again.mean() == 3.0
    assert again.statistics("max") == 6.0
    assert again.data[1].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["?", "i1", "u2", "i4", "i8", "f2", "f4", "f8"])
@pytest.mark.usefixtures("kept_safe_globals")
def test_numpy_arrays_and_scalars_come_back(kind, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(kind)
    again = reload({"array": array, "scalar": array[1, 2]}, tmp_path / "a.pth")
    assert again["array"].dtype == array.dtype and (again["array"] == array).all()
    assert again["scalar"] == array[1, 2] and type(again["scalar"]) is type(array[1, 2])


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_arrays_of_numpy_1_and_2_are_known_by_their_names(module):
    names = {entry[1] for entry in safe_globals() if isinstance(entry, tuple)}
    assert {f"{module}._reconstruct", f"{module}.scalar"} <= names


@pytest.mark.usefixtures("kept_safe_globals")
def test_arguments_of_the_first_release_come_back(tmp_path):
    assert reload(argparse.Namespace(num_queries=300), tmp_path / "a.pth").num_queries == 300


class Reaching:
    """Pickles as ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.parts = (owner, name)

    def __reduce__(self):
        return getattr, self.parts


@pytest.mark.parametrize(
    ("owner", "name"), [(HistoryBuffer, "__init__"), (HistoryBuffer, "__reduce__"), (np.ndarray, "tofile")]
)
@pytest.mark.usefixtures("kept_safe_globals")
def test_other_attributes_are_refused(owner, name, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="no plain data"):
        reload(Reaching(owner, name), tmp_path / "a.pth")


@pytest.mark.parametrize(
    "value", [np.array([{}], dtype=object), print, pickle.loads], ids=["objects", "print", "loads"]
)
@pytest.mark.usefixtures("kept_safe_globals")
def test_what_is_no_data_is_refused(value, tmp_path):
    with pytest.raises(pickle.UnpicklingError):
        reload(value, tmp_path / "a.pth")


@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt("interrupted by SIGTERM"), SystemExit(3), ValueError("of yapf")]
)
def test_an_interruption_while_a_config_is_written_stays_one(interruption, monkeypatch):
    """mmengine's bare ``except`` makes a SyntaxError of everything."""
    patches.apply_patches(["interruptions while a config is written"] * 2)

    def interrupted(*arguments, **options):
        raise interruption

    monkeypatch.setattr("mmengine.config.config.FormatCode", interrupted)
    expected = SyntaxError if isinstance(interruption, Exception) else type(interruption)
    with pytest.raises(expected) as caught:
        _ = Config({"model": {"type": "A"}}).pretty_text
    assert isinstance(interruption, Exception) or caught.value is interruption
