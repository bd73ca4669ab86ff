"""The study: each field of ``ddetr_mm.automl`` by its effect, failures, stops, kills, several processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from automl_project import HERE, epochs_of, trials_of, value_of

from ddetr_mm.automl import study
from ddetr_mm.automl.space import Parameter, SearchSpace
from ddetr_mm.automl.study import (
    default_url,
    make_pruner,
    make_sampler,
    masked,
    open_storage,
    rungs,
    without_password,
)
from ddetr_mm.cli import main
from ddetr_mm.errors import DataError, Problem
from ddetr_mm.tasks import automl

optuna = pytest.importorskip("optuna")
sqlalchemy = pytest.importorskip("sqlalchemy")


def states(folder: Path) -> list[str]:
    return [one.state.name for one in trials_of(folder)]


def spec_of(folder: Path, number: int) -> dict:
    return yaml.safe_load((folder / f"trial_{number:03d}" / "spec.yaml").read_text())


# --- algorithms ---

ALGORITHMS = ("bayesian", "hyperband", "bohb", "asha", "random", "grid")


def test_rungs():
    assert rungs("asha", 27, 3) == [1, 3, 9, 27]
    assert rungs("hyperband", 10, 2) == rungs("bohb", 10, 2) == [1, 2, 4, 8, 10]
    assert rungs("bayesian", 27, 3) == rungs("random", 27, 3) == rungs("grid", 27, 3) == [27]
    assert rungs("asha", 1, 3) == [1]


@pytest.mark.parametrize("algorithm", ["bayesian", "random"])
def test_trials_are_trained_to_their_end(search, algorithm):
    folder = search(f"algorithm={algorithm}", "max_trials=3", "max_epochs=2")
    assert states(folder) == ["COMPLETE"] * 3
    assert [epochs_of(folder, number) for number in range(3)] == [[0, 1]] * 3
    for number, one in enumerate(trials_of(folder)):
        assert one.value == value_of(spec_of(folder, number), 2)


def test_samplers_and_pruners():
    space = SearchSpace({"train.optim.lr": Parameter("train.optim.lr", False, 1e-3, 1e-4, 1e-2)}, ())
    kinds = {name: type(make_sampler(name, space, 1)).__name__ for name in ALGORITHMS}
    assert kinds["bayesian"] == kinds["bohb"] == "TPESampler" and kinds["grid"] == "GridSampler"
    assert kinds["random"] == kinds["asha"] == kinds["hyperband"] == "RandomSampler"
    pruners = {name: type(make_pruner(name, 27, 3)).__name__ for name in ALGORITHMS}
    assert pruners["hyperband"] == pruners["bohb"] == "HyperbandPruner"
    assert pruners["asha"] == "SuccessiveHalvingPruner"
    assert pruners["bayesian"] == pruners["random"] == pruners["grid"] == "NopPruner"


def test_the_first_trial_has_the_specs_own_values(search):
    folder = search("max_trials=2", "max_epochs=1", "train.optim.lr=0.02")  # outside of the range
    first = trials_of(folder)[0]
    assert first.user_attrs["own"] and spec_of(folder, 0)["train"]["optim"]["lr"] == 0.02
    assert first.user_attrs["values"]["train.optim.lr"] == 0.02
    assert first.params["train.optim.lr"] == 0.01


def test_grid_tries_every_combination_once(search):
    folder = search(
        "algorithm=grid",
        "max_trials=9",
        "max_epochs=1",
        "parameters=[{field: train.optim.lr, range: [0.0001, 0.01]},"
        "{field: dataset.batch_size, choices: [2, 4]}]",
    )
    tried = {
        (round(one.params["train.optim.lr"], 6), one.params["dataset.batch_size"])
        for one in trials_of(folder)
    }
    assert tried == {(rate, batch) for rate in (1e-4, 1e-3, 1e-2) for batch in (2, 4)}
    assert len(states(folder)) == 6


def test_a_grid_larger_than_the_trials_is_refused(search, capsys):
    search("algorithm=grid", status=2)
    assert "a grid of 6 points, more than max_trials=4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("algorithm", "factor"),
    [
        ("asha", 2),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in [("asha", 4), ("hyperband", 2), ("bohb", 2)]),
    ],
)
def test_trials_that_fall_behind_end_early_and_none_trains_an_epoch_twice(search, algorithm, factor):
    folder = search(f"algorithm={algorithm}", f"reduction_factor={factor}", "max_trials=8")
    found = trials_of(folder)
    assert {one.state.name for one in found} == {"COMPLETE", "PRUNED"}
    for one in found:
        epochs = epochs_of(folder, one.number)
        assert epochs == list(range(len(epochs)))
        assert (
            len(epochs) == 4 if one.state.name == "COMPLETE" else len(epochs) in rungs(algorithm, 4, factor)
        )
        assert max(one.intermediate_values) == len(epochs)
    best = max(found, key=lambda one: one.intermediate_values[max(one.intermediate_values)])
    assert best.state.name == "COMPLETE"


def test_rungs_keep_the_schedule_of_all_epochs(search):
    folder = search("algorithm=asha", "max_trials=1")
    assert spec_of(folder, 0)["train"]["num_epochs"] == 4  # the stops are arguments of the command


# --- metric and direction ---


@pytest.mark.parametrize(
    ("overrides", "best_is_largest"),
    [
        (["metric=val_loss"], False),
        (["metric=val_loss", "direction=maximize"], True),
        (["direction=minimize"], False),
    ],
)
def test_metric_and_direction(search, overrides, best_is_largest):
    folder = search(*overrides, "max_trials=2", "max_epochs=1")
    found = trials_of(folder)
    metric = "val_loss" if "metric=val_loss" in overrides else "val_mAP50"
    for one in found:
        value = value_of(spec_of(folder, one.number), 1)
        assert one.value == pytest.approx(1 - value if metric == "val_loss" else value)
    wanted = max(found, key=lambda one: one.value if best_is_largest else -one.value)
    assert spec_of(folder, wanted.number)["train"]["checkpointer"]["mode"] == (
        "max" if best_is_largest else "min"
    )
    assert (folder / "best.pth").read_text() == f"weights of trial_{wanted.number:03d}"


def test_an_unknown_metric_is_refused_with_the_nearest(search, capsys):
    search("metric=test_mAP50", status=2)
    assert "did you mean val_mAP50?" in capsys.readouterr().err


# --- the end ---


def test_the_best_spec_the_checkpoint_and_the_page_are_left(search, project, capsys):
    folder = search("max_trials=3", "max_epochs=1")
    best = max(trials_of(folder), key=lambda one: one.value)
    spec = yaml.safe_load((folder / "best_spec.yaml").read_text())
    assert spec["train"]["optim"]["lr"] == best.user_attrs["values"]["train.optim.lr"]
    assert spec["dataset"]["batch_size"] == best.user_attrs["values"]["dataset.batch_size"]
    assert spec["evaluate"]["checkpoint"] == "results/automl/best.pth" and spec["results_dir"] == "results"
    assert (folder / "best.pth").read_text() == f"weights of trial_{best.number:03d}"
    assert f"Best: trial {best.number:03d}" in capsys.readouterr().out
    assert "AutoML: val_mAP50" in (folder / "automl.html").read_text()
    last = [json.loads(line) for line in (folder / "status.json").read_text().splitlines()][-1]
    assert last["status"] == "SUCCESS" and last["kpi"] == {"best_val_mAP50": best.value}


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_of_losing_trials(search, keep):
    folder = search(f"keep_checkpoints={keep}", "max_trials=2", "max_epochs=1")
    best = max(trials_of(folder), key=lambda one: one.value).number
    with_checkpoints = {path.parent.parent.name for path in folder.glob("trial_*/train/*.pth")}
    assert with_checkpoints == ({f"trial_{number:03d}" for number in ((0, 1) if keep else (best,))})
    assert len(list(folder.glob("trial_*/train/status.json"))) == 2


def test_more_trials_continue_a_finished_study(search):
    search("max_trials=2", "max_epochs=1")
    folder = search("max_trials=4", "max_epochs=1")
    assert states(folder) == ["COMPLETE"] * 4
    assert all(epochs_of(folder, number) == [0] for number in range(4))


def test_a_study_of_another_spec_is_refused_with_the_difference(search, capsys):
    search("max_trials=1", "max_epochs=1")
    search("max_trials=1", "max_epochs=1", "train.optim.weight_decay=0.5", status=2)
    assert "train.optim.weight_decay: 0.0001 → 0.5" in capsys.readouterr().err


# --- failures ---


def test_a_failed_trial_has_its_reason_and_the_study_goes_on(search, monkeypatch, capsys):
    monkeypatch.setenv(
        "STAND_IN_FAILS", "s['dataset']['batch_size'] == 4 and s['results_dir'].endswith('000')"
    )
    folder = search("max_trials=3", "max_epochs=1")
    assert states(folder) == ["FAIL", "COMPLETE", "COMPLETE"]
    assert "CUDA out of memory" in trials_of(folder)[0].user_attrs["reason"]
    assert "trial 000 failed: RuntimeError: CUDA out of memory" in capsys.readouterr().err


def test_the_study_stops_when_the_first_trials_fail_for_one_reason(search, monkeypatch, capsys):
    monkeypatch.setenv("STAND_IN_FAILS", "True")
    folder = search("max_trials=9", status=1)
    assert states(folder) == ["FAIL"] * 3
    message = capsys.readouterr().err
    assert "the first 3 trials failed for one reason" in message and "CUDA out of memory, 12.5 GiB" in message


def test_different_reasons_do_not_stop_it(search, monkeypatch):
    monkeypatch.setenv("STAND_IN_FAILS", "True")
    # The name of the trial is no difference, the learning rate's is.
    monkeypatch.setenv("STAND_IN_REASON", "diverged")
    folder = search("max_trials=2", status=1)
    assert states(folder) == ["FAIL"] * 2


def test_problems_of_the_data_reach_the_message(project, capsys, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise DataError(Problem("has no boxes", file="a.json"), Problem("is missing", file="b.json"))

    monkeypatch.setattr(automl, "early_check", refuse)
    assert main(["automl", "-e", "spec.yaml"]) == 2
    message = capsys.readouterr().err
    assert "a.json: has no boxes" in message and "b.json: is missing" in message
    assert (project / "results/automl").is_dir() and not list(project.glob("results/automl/trial_*"))


@pytest.mark.slow
def test_wrong_data_end_the_search_before_a_trial(project, capsys):
    (project / "train.json").write_text("{")
    assert main(["automl", "-e", "spec.yaml"]) == 2
    assert "train.json" in capsys.readouterr().err
    assert (project / "results/automl").is_dir() and not list(project.glob("results/automl/trial_*"))


# --- time, several at once ---


def test_time_limit_and_the_same_command_again(search, monkeypatch):
    monkeypatch.setenv("STAND_IN_HOLD_AT", "1")
    folder = search("timeout_hours=0.0002", "max_trials=2")
    assert "COMPLETE" not in states(folder)
    monkeypatch.delenv("STAND_IN_HOLD_AT")
    search("max_trials=2")
    assert states(folder) == ["COMPLETE"] * 2
    assert epochs_of(folder, 0) == epochs_of(folder, 1) == [0, 1, 2, 3]


def test_concurrent_trials_have_their_own_gpus(search, monkeypatch):
    monkeypatch.setenv("STAND_IN_TOGETHER", "results/automl/trial_*/train/status.json")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    text = Path("spec.yaml").read_text().replace("device: cpu", "device: auto")
    Path("spec.yaml").write_text(text)
    folder = search("concurrent=2", "max_trials=2", "max_epochs=1", "train.gpu_ids=[4,5,6,7]")
    first = [
        json.loads((folder / f"trial_00{n}/train/status.json").read_text().splitlines()[0]) for n in (0, 1)
    ]
    assert {one["devices"] for one in first} == {"4,5", "6,7"}
    begun = [one.datetime_start for one in trials_of(folder)]
    ended = [one.datetime_complete for one in trials_of(folder)]
    assert max(begun) < min(ended)


def test_gpus_that_cannot_be_divided_are_refused(search, capsys):
    search("concurrent=3", "train.gpu_ids=[0,1]", status=2)
    assert "does not divide the 2 GPUs" in capsys.readouterr().err


# --- processes ---


def start(project: Path, *overrides: str) -> subprocess.Popen[str]:
    """The search as a process of its own."""
    command = [sys.executable, str(HERE), "automl", "-e", "spec.yaml", *overrides]
    return subprocess.Popen(command, cwd=project, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def outputs_of(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What processes printed; none is left where one does not end."""
    try:
        return [one.communicate(timeout=120)[0] for one in processes]
    finally:
        for one in processes:
            one.kill()


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_study_that_was_ended_continues_its_trials(search, project, monkeypatch, number):
    monkeypatch.setenv("STAND_IN_HOLD_AT", "2")
    options = ("ddetr_mm.automl.concurrent=2", "ddetr_mm.automl.max_trials=3")
    first = start(project, *options)
    folder = project / "results" / "automl"
    status = folder / "trial_000" / "train" / "status.json"
    wait_for(lambda: status.exists() and '"epoch": 1' in status.read_text())
    first.send_signal(number)
    output = first.communicate(timeout=30)[0]
    assert first.returncode == (-9 if number == signal.SIGKILL else 130), output
    assert "RUNNING" in states(folder) and epochs_of(folder, 0) == [0, 1]
    monkeypatch.delenv("STAND_IN_HOLD_AT")
    search("concurrent=2", "max_trials=3")
    assert states(folder) == ["COMPLETE"] * 3
    assert [epochs_of(folder, one) for one in range(3)] == [[0, 1, 2, 3]] * 3


@pytest.mark.slow
def test_two_processes_share_a_study(project, monkeypatch):
    monkeypatch.setenv("STAND_IN_TOGETHER", str(project / "results/automl/trial_*/train/status.json"))
    both = [start(project, "ddetr_mm.automl.max_trials=5") for _ in range(2)]
    outputs = outputs_of(both)
    assert [one.returncode for one in both] == [0, 0], outputs
    folder = project / "results" / "automl"
    assert [one.state.name for one in trials_of(folder) if not one.user_attrs.get("surplus")] == [
        "COMPLETE"
    ] * 5
    assert [epochs_of(folder, number) for number in range(5)] == [[0, 1, 2, 3]] * 5
    assert all("trial 00" in output for output in outputs)  # each ran some
    assert len({tuple(one.params.values()) for one in trials_of(folder)}) == 5


# --- storage ---


def test_a_study_in_a_file_of_the_users(search, project):
    url = f"sqlite:///{project / 'mine.db'}"
    folder = search(f"storage={url}", "max_trials=1", "max_epochs=1")
    assert len(trials_of(folder, url)) == 1 and not (folder / "study.db").exists()


@pytest.mark.parametrize(
    "words",
    ["table studies already exists", "database is locked", "UNIQUE constraint failed: alembic_version"],
)
def test_tables_that_another_process_makes_at_once_are_waited_for(tmp_path: Path, monkeypatch, words):
    made = []

    def make(*arguments: object, **options: object) -> str:
        made.append(arguments)
        if len(made) < 3:
            raise sqlalchemy.exc.OperationalError("statement", {}, Exception(words))
        return "storage"

    monkeypatch.setattr(optuna.storages, "RDBStorage", make)
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    assert open_storage(None, tmp_path) == "storage" and len(made) == 3


def test_a_folder_with_braces_and_blanks_holds_a_study(tmp_path: Path):
    folder = tmp_path / "a {b} c%20"
    folder.mkdir()
    optuna.create_study(storage=default_url(folder))
    assert (folder / "study.db").is_file()


def test_passwords_never_show(search, project, capsys):
    url = "postgresql+psycopg://me:pa55word@127.0.0.1:1/study?options=pa55word"
    folder = search(f"storage={url}", "max_trials=1", status=2)
    printed = capsys.readouterr()
    assert "ddetr_mm.automl.storage: cannot be opened" in printed.err
    assert "postgresql+psycopg://me:***@127.0.0.1:1/study" in printed.err
    assert "pa55word" not in printed.out + printed.err
    for path in folder.rglob("*"):
        assert not path.is_file() or b"pa55word" not in path.read_bytes()
    assert masked("sqlite:///a.db") == "sqlite:///a.db"
    assert without_password("no pa55 at h", "x://u:pa55@h/d") == "no *** at h"


def test_a_wrong_storage_is_refused_in_one_line(search, capsys):
    for url in ("nonsense", "mongo://h/d"):
        search(f"storage={url}", status=2)
        assert "ddetr_mm.automl.storage" in capsys.readouterr().err


def test_a_trial_of_a_silent_machine_fails_and_keeps_the_reason(search):
    import optuna

    folder = search("max_trials=1")
    storage = f"sqlite:///{folder / 'study.db'}"
    (name,) = optuna.get_all_study_names(storage)
    other = optuna.load_study(study_name=name, storage=storage).ask()
    other.set_user_attr("owner", {"host": "elsewhere", "folder": "/elsewhere/trial", "since": 0.0})
    search("max_trials=2")
    trial = trials_of(folder)[other.number]
    assert trial.state.name == "FAIL"
    assert trial.user_attrs["reason"] == "its machine, elsewhere, has not shown itself for 15 minutes"
