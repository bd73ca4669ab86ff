"""``ddetr-mm compare``: what it reads of runs, what differs, the tables and the page."""

from __future__ import annotations

import json
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from browser import WIDTHS

from ddetr_mm.cli import main
from ddetr_mm.errors import DataError, SpecError
from ddetr_mm.tasks.compare import (
    class_rows,
    differing_fields,
    read_fields,
    read_runs,
    results_folders,
    run_names,
)

EVIL = "<script>alert(1)</script>[bold]"


def status(*lines: dict) -> str:
    return "".join(json.dumps({"status": "RUNNING", **line}) + "\n" for line in lines)


def epoch(number: int, loss: float, ap: float, classes: dict | None = None) -> list[dict]:
    """Lines of an epoch, as training writes them."""
    return [
        {"epoch": number, "max_epoch": 9, "step": 10 * number, "message": "Training loop in progress"},
        {"message": "Train metrics generated.", "kpi": {"train_loss": loss}},
        {
            "message": "Eval metrics generated.",
            "kpi": {"val_mAP": str(ap), "val_mAP50": str(2 * ap)},
            **({"categorical": {"AP": classes}} if classes else {}),
        },
        {"message": "Saved a checkpoint", "kpi": {"val_mAP": "0.99"}},  # repeated figures are not points
    ]


BEGIN = {"message": "Starting Training Loop.", "status": "STARTED"}


def make_run(folder: Path, spec: str, *lines: dict, subtask: str = "train") -> Path:
    """A results folder with a spec and a status file; returns the folder above it."""
    (folder / subtask).mkdir(parents=True)
    (folder / subtask / "experiment.yaml").write_text(spec, encoding="utf-8")
    (folder / subtask / "status.json").write_text(status(*lines), encoding="utf-8")
    return folder


@pytest.fixture
def two_runs(tmp_path: Path) -> list[str]:
    first = make_run(
        tmp_path / "first",
        "results_dir: a\nencryption_key: abc\ntrain: {optim: {lr: 1e-4}, num_epochs: 3}\n",
        BEGIN,
        *epoch(0, 9.0, 0.1),
        *epoch(1, 8.0, 0.3, {"cat": 0.2, "dog": 0.4}),
        *epoch(2, 7.0, 0.2, {"cat": 0.3, "dog": 0.1}),
        {"message": "Train finished successfully.", "status": "SUCCESS"},
    )
    second = make_run(
        tmp_path / "second",
        "results_dir: b\nencryption_key: xyz\ntrain: {optim: {lr: 2e-4}, num_epochs: 3}\n"
        "model: {num_queries: 30}\n",
        BEGIN,
        *epoch(0, 5.0, 0.4, {"cat": 0.5, EVIL: 0.25}),
    )
    return [str(first), str(second)]


def test_curves_are_those_of_the_epochs(two_runs):
    first, second = read_runs(two_runs)
    assert first.curves == {
        "train_loss": {1: 9.0, 2: 8.0, 3: 7.0},
        "val_mAP": {1: 0.1, 2: 0.3, 3: 0.2},
        "val_mAP50": {1: 0.2, 2: 0.6, 3: 0.4},
    }
    assert first.best("val_mAP") == (0.3, 2) and first.epochs == 3 and first.best("val_loss") is None
    assert (first.state, second.state, second.epochs) == ("SUCCESS", "RUNNING", 1)
    assert (first.name, second.name) == ("first", "second")
    assert first.classes == {"cat": 0.3, "dog": 0.1} and first.classes_from == "validation of epoch 3"


def test_only_what_differs_is_listed(two_runs):
    assert differing_fields(read_runs(two_runs)) == {
        "train.optim.lr": ["0.0001", "0.0002"],
        "model.num_queries": ["–", "30"],
    }


def test_secrets_are_hidden(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("encryption_key: abc\nwandb: {api_key: ''}\ndataset: {sources: [{image_dir: x}]}\n")
    assert read_fields(path) == {
        "encryption_key": "(hidden)",
        "wandb.api_key": "",
        "dataset.sources": '[{"image_dir": "x"}]',
    }


def test_classes_of_all_runs_are_side_by_side(two_runs):
    assert class_rows(read_runs(two_runs)) == {
        "cat": [0.3, 0.5],
        "dog": [0.1, None],
        EVIL: [None, 0.25],
    }


def test_a_resumed_run_is_one_curve_and_a_second_run_in_the_folder_another(tmp_path):
    resumed = {"message": "Resuming training from checkpoint: a.pth"}
    make_run(tmp_path / "a", "{}", BEGIN, *epoch(0, 9.0, 0.1), resumed, BEGIN, *epoch(1, 8.0, 0.2))
    make_run(tmp_path / "b", "{}", BEGIN, *epoch(4, 9.0, 0.1), BEGIN, *epoch(0, 8.0, 0.2))
    first, second = read_runs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert first.curves["val_mAP"] == {1: 0.1, 2: 0.2}
    assert second.curves["val_mAP"] == {1: 0.2}


def test_results_of_evaluate_go_before_those_of_training(two_runs, tmp_path):
    folder = tmp_path / "first" / "evaluate"
    folder.mkdir()
    (folder / "status.json").write_text(status({"message": "Evaluate finished.", "status": "FAILURE"}))
    (folder / "results.json").write_text(json.dumps({"AP": 0.375, "AP50": 0.5, "APs": -1.0}))
    entries = [{"name": "cat", "AP": 0.375}, {"name": "none", "AP": -1.0}]
    (folder / "results_detail.json").write_text(json.dumps({"per_class": entries}))
    first, _ = read_runs(two_runs)
    assert first.metrics == {"AP": 0.375, "AP50": 0.5}
    assert first.classes == {"cat": 0.375} and first.classes_from == "evaluate"
    assert first.state == "SUCCESS"  # of train
    alone, _ = read_runs([str(folder), two_runs[1]])
    assert alone.curves == {} and alone.fields == {}


def test_a_line_that_a_kill_has_cut_off_is_left_out(two_runs):
    path = Path(two_runs[0]) / "train" / "status.json"
    path.write_text(path.read_text() + '{"epoch": 3, "max_ep')
    assert read_runs(two_runs)[0].epochs == 3


def test_names_are_as_short_as_they_can_be():
    assert run_names([Path("/r/a/train"), Path("/r/b/train")]) == ["a", "b"]
    assert run_names([Path("/r/x/a"), Path("/r/y/a")]) == ["x/a", "y/a"]
    assert run_names([Path("/r/a/train"), Path("/r/a/evaluate")]) == ["train", "evaluate"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["first"], "at least two runs"),
        (["first", "first/train"], "is given twice"),
        (["first", "empty", "missing"], "is no results folder of train or evaluate"),
    ],
)
def test_wrong_folders_are_refused(two_runs, tmp_path, monkeypatch, capsys, given, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read_runs(given)
    assert main(["compare", *given]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "compare.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("train/experiment.yaml", "a: [", SpecError),
        ("train/results.json", "[1]", DataError),
        ("train/results_detail.json", "{", DataError),
    ],
)
def test_broken_files_are_named(two_runs, name, content, kind):
    path = Path(two_runs[0]) / name
    path.write_text(content)
    with pytest.raises(kind, match=path.name.replace(".", r"\.")):
        read_runs(two_runs)


def test_tables_and_page(two_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *two_runs]) == 0
    out = capsys.readouterr().out
    assert "0.300 (epoch 2)" in out and "+0.200" in out and "train.optim.lr" in out
    assert EVIL in out  # not read as rich's markup
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert page.count('<figure class="chart"') == 3 and page.count("<script>") == 1
    assert EVIL in unescape(page) and 'class="number better" data-value="0.2' in page
    assert "abc" not in page and "xyz" not in page


def test_files_of_others_and_what_is_read_stay(two_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare.html").write_text("mine")
    assert main(["compare", *two_runs]) == 2
    assert "no run of ours wrote it" in capsys.readouterr().err
    assert (tmp_path / "compare.html").read_text() == "mine"
    read = Path(two_runs[0]) / "train" / "status.json"
    before = read.read_bytes()
    assert main(["compare", *two_runs, "--force", "-o", str(read)]) == 2
    assert read.read_bytes() == before
    assert main(["compare", *two_runs, "--force"]) == 0
    assert main(["compare", *two_runs]) == 0  # its own page


def test_it_needs_no_torch():
    code = (
        "import sys, ddetr_mm.tasks.compare as c; c.results_folders; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'mmdet', 'matplotlib', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    assert results_folders(Path("/nowhere")) == []


# --- real runs ---


@pytest.fixture(scope="module")
def real_pages(trained_project, tmp_path_factory) -> dict[str, Path]:
    """Pages of the tiny training run, of its evaluation, and of a comparison of the two."""
    folder = tmp_path_factory.mktemp("pages")
    train = trained_project.results / "train"
    trained_project.tiny(
        "evaluate", f"evaluate.checkpoint={train / 'dd_model_latest.pth'}", f"evaluate.results_dir={folder}"
    )
    done = trained_project.run("compare", str(train), str(folder), "-o", str(folder / "compare.html"))
    assert "AP by class" in done.stdout and "triangle" in done.stdout
    lines = [json.loads(line) for line in (train / "status.json").read_text().splitlines()]
    (by_class,) = [line["categorical"]["AP"] for line in lines if "categorical" in line]
    assert set(by_class) == {"circle", "rectangle", "star", "triangle"}
    return {
        "report": folder / "report.html",
        "curves": train / "curves.html",
        "compare": folder / "compare.html",
    }


@pytest.mark.parametrize("name", ["report", "curves", "compare"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_pages_of_real_runs_can_be_read(browser, real_pages, name, width, dark):
    browser.open(real_pages[name], width=width, dark=dark)
    browser.assert_readable()
    assert browser.run("return document.querySelectorAll('h1').length") == 1
