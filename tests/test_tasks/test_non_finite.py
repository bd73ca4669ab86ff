"""A loss or gradients that are not finite: told, saved, repeated by a command, skipped where asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel

from ddetr_mm.cli import main
from tests.test_tasks.conftest import TINY, Project

LAYER = "encoder.layers.0.ffn.layers.0.0"


@pytest.fixture
def train(data_project: Project, tmp_path: Path, monkeypatch):
    """``train(after_step)``: train in this process; ``after_step(runner)`` is called after every step."""
    from ddetr_mm.engine.hooks import ProgressHook

    def run(after_step, *overrides: str) -> int:
        def after_train_iter(hook, runner, batch_idx, data_batch=None, outputs=None):
            with torch.no_grad():
                after_step(runner)

        monkeypatch.chdir(data_project.folder)
        monkeypatch.setattr(ProgressHook, "after_train_iter", after_train_iter)
        arguments = [*TINY, f"train.results_dir={tmp_path}", *overrides]
        return main(["train", "-e", data_project.spec, *arguments])

    return run


def scale_layer(runner, factor: float) -> None:
    """Finite weights that overflow in the layer's output."""
    runner.model.get_submodule(LAYER).weight.mul_(factor)


def test_training_stops_and_a_command_repeats_the_step(train, tmp_path: Path, capsys):
    kept = {}

    def overflow(runner):
        if runner.iter == 1:
            scale_layer(runner, 1e38)
            kept.update({key: value.clone() for key, value in runner.model.state_dict().items()})

    assert train(overflow) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "the loss is not finite in step 2" in told and f"first in the output of {LAYER} (Linear)" in told
    assert told.count("/images/") == 4 and "ddetr-mm reproduce" in told
    saved = tmp_path / "non_finite_step_00002.pth"
    content = torch.load(saved, weights_only=True)
    assert all(torch.equal(value, kept[key]) for key, value in content["state_dict"].items())
    last = json.loads((tmp_path / "status.json").read_text().splitlines()[-1])
    assert last["status"] == "FAILURE" and "the loss is not finite in step 2" in last["message"]

    assert main(["reproduce", str(saved)]) == 0
    repeated = capsys.readouterr().out
    assert f"first in the output of {LAYER} (Linear)" in repeated and repeated.count("/images/") == 4


def test_skipped_steps_leave_the_weights_alone(train, tmp_path: Path, capfd):
    before = {}

    def overflow_in_one_step(runner):
        if runner.iter == 2:
            # the step was skipped: nothing has moved since the overflow began
            state = runner.model.state_dict()
            assert all(torch.equal(value, state[key]) for key, value in before.items())
            assert runner.optim_wrapper.optimizer.state[next(runner.model.neck.parameters())]["step"] == 2
            scale_layer(runner, 1e-38)
        if runner.iter == 1:
            scale_layer(runner, 1e38)
            before.update({key: value.clone() for key, value in runner.model.state_dict().items()})

    assert train(overflow_in_one_step, "ddetr_mm.non_finite=skip") == 0
    told = "".join(capfd.readouterr())
    assert "Step skipped: the loss is not finite in step 2" in told and LAYER in told
    assert (tmp_path / "non_finite_step_00002.pth").is_file()
    end = torch.load(tmp_path / "dd_model_latest.pth", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in end.values() if value.is_floating_point())


def test_gradients_are_watched_too(train, tmp_path: Path, capsys):
    def break_gradient(runner):
        if runner.iter == 0:
            weight = runner.model.get_submodule(LAYER).weight
            with torch.enable_grad():
                weight.register_hook(lambda gradient: gradient * float("inf"))

    assert train(break_gradient, "train.clip_grad_norm=0") == 1
    told = capsys.readouterr().err
    assert "the gradients are not finite in step 1" in told
    assert f"first in the gradient of {LAYER}.weight" in told


def test_a_run_that_only_skips_ends(train, monkeypatch, capsys):
    monkeypatch.setattr("ddetr_mm.engine.non_finite.MOST_SKIPPED_IN_A_ROW", 2)

    def overflow(runner):
        if runner.iter == 0:
            scale_layer(runner, 1e38)

    assert train(overflow, "ddetr_mm.non_finite=skip") == 1
    assert "2 steps in a row had no finite loss" in capsys.readouterr().err


def test_another_file_is_no_saved_batch(tmp_path: Path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "a.pth")
    assert main(["reproduce", str(tmp_path / "a.pth")]) == 2
    assert "config.py: the run's config does not exist" in capsys.readouterr().err
    (tmp_path / "config.py").write_text("model = dict(type='X')\n")
    assert main(["reproduce", str(tmp_path / "a.pth")]) == 2
    assert "a.pth: is no saved batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "most"),
    [((), 3), (("train.clip_grad_norm=0",), 4)],
    ids=["clipped", "not clipped"],
)
def test_a_step_of_a_run_reads_at_most_three_times(train, monkeypatch, overrides, most):
    """The matching's costs, the gradient's norm and the losses, whatever watches them; else one more."""
    from host_reads import counted_host_reads

    model, counts = BaseModel.train_step, []

    def counted(self, data, optim_wrapper):
        with counted_host_reads(torch.device("cpu")) as reads:
            outputs = model(self, data, optim_wrapper)
        counts.append(reads)
        return outputs

    monkeypatch.setattr(BaseModel, "train_step", counted)
    assert train(lambda runner: None, *overrides) == 0
    assert len(counts) > 2
    assert all(len(reads) <= most for reads in counts[1:]), counts[1]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_is_watched_while_gradients_add_up_and_under_a_scaler(train, capsys, precision):
    def overflow(runner):
        if runner.iter == 1:
            scale_layer(runner, 1e38)

    adding_up = (f"train.precision={precision}", "ddetr_mm.accumulate_steps=3")
    assert train(overflow, *adding_up) == 1
    assert "the loss is not finite in step 2" in capsys.readouterr().err
