"""No command replaces an input or a file that no run of ours wrote; two runs do not share a folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input_project import assert_told, contents, run_here

SPEC = ("-e", "spec.yaml")
EXPORT = ("export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=x.onnx")
INFERENCE = ("inference", *SPEC, "inference.checkpoint=random.pth", "inference.conf_threshold=0")
EVALUATE = ("evaluate", *SPEC, "evaluate.checkpoint=random.pth")

# Command, and the file that is in its way.
IN_THE_WAY = {
    "train config": (("train", *SPEC), "results/train/config.py"),
    "train experiment": (("train", *SPEC), "results/train/experiment.yaml"),
    "train status": (("train", *SPEC), "results/train/status.json"),
    "train latest": (("train", *SPEC, "train.num_epochs=1"), "results/train/dd_model_latest.pth"),
    "train checkpoint": (("train", *SPEC), "results/train/model_epoch_000.pth"),
    "evaluate report": (EVALUATE, "results/evaluate/report.html"),
    "evaluate results": (EVALUATE, "results/evaluate/results.json"),
    "inference label": (INFERENCE, "results/inference/labels/00000.txt"),
    "inference picture": (INFERENCE, "results/inference/images_annotated/00001.png"),
    "export parity": (EXPORT, "x.parity.json"),
    "export labels": ((*EXPORT, "export.serialize_nvdsinfer=true"), "labels.txt"),
    "export deepstream": ((*EXPORT, "export.serialize_nvdsinfer=true"), "nvdsinfer_config.yaml"),
    "translate": (("translate", *SPEC, "-o", "mine.py"), "mine.py"),
    "weights": (("weights", "random.pth", "mine.pth", "--to", "tao"), "mine.pth"),
    "weights report": (("weights", "random.pth", "mine.pth", "--to", "tao"), "mine.report.json"),
    "predict": (("predict", "random.pth", "data/val/images", "--out", "p"), "p/predictions.json"),
    "predict picture": (
        ("predict", "random.pth", "data/val/images", "--out", "p"),
        "p/images_annotated/00000.png",
    ),
    "check": (("check", *SPEC, "--quick"), "results/train/check.json"),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_file_of_somebody_else_stays(name, own_project):
    command, file = IN_THE_WAY[name]
    path = own_project / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    ended = run_here(own_project, *command)
    assert path.read_text() == "mine", "it was replaced"
    assert_told(ended, Path(file).name, "--force")


@pytest.mark.parametrize(
    "name", ["train config", "inference label", "translate", "weights report", "predict"]
)
def test_with_force_it_is_replaced(name, own_project):
    command, file = IN_THE_WAY[name]
    path = own_project / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    ended = run_here(own_project, *command, "--force", fork=command[0] != "train")
    assert ended.status == 0, ended.message
    assert path.read_text() != "mine"


# Command whose result would be one of its inputs.
ONTO_INPUTS = {
    "weights onto its source": (("weights", "random.pth", "random.pth", "--to", "mmdet"), "random.pth"),
    "weights onto its spec": (("weights", "random.pth", "spec.yaml", "--to", "tao", *SPEC), "spec.yaml"),
    "translate onto its spec": (("translate", "-e", "spec.py", "-o", "spec.py"), "spec.py"),
    "export onto its checkpoint": (
        ("export", *SPEC, "export.checkpoint=random.pth", "export.onnx_file=random.pth"),
        "random.pth",
    ),
    "inference onto its pictures": (
        (
            *INFERENCE,
            "inference.results_dir=shown",
            "dataset.infer_data_sources.image_dir=[shown/images_annotated]",
        ),
        "shown/images_annotated/00000.png",
    ),
    "predict onto its pictures": (
        ("predict", "random.pth", "shown/images_annotated", "--out", "shown"),
        "shown/images_annotated/00000.png",
    ),
}


@pytest.mark.parametrize("name", ONTO_INPUTS)
@pytest.mark.parametrize("force", [False, True])
def test_an_input_is_never_replaced(name, force, own_project):
    command, file = ONTO_INPUTS[name]
    if force and command[0] == "export":
        pytest.skip("--force of export is about its target")
    shutil.copy(own_project / "spec.yaml", own_project / "spec.py")
    shutil.copytree(own_project / "data/val/images", own_project / "shown/images_annotated")
    before = (own_project / file).read_bytes()
    ended = run_here(own_project, *command, *(["--force"] if force else []))
    assert (own_project / file).read_bytes() == before
    assert ended.status == 2, ended.message
    assert not ended.lost and "Traceback" not in ended.message


@pytest.mark.parametrize("place", ["data/val", "data"])
def test_inference_into_a_data_folder_leaves_labels_and_pictures(place, own_project):
    """``labels/`` of a sequence holds ground truth under the names of the results."""
    before = contents(own_project / "data")
    ended = run_here(own_project, *INFERENCE, f"inference.results_dir={place}")
    after = contents(own_project / "data")
    assert {name: after[name] for name in before} == before
    if place == "data/val":
        assert_told(ended, "labels", "--force")


def test_a_rerun_into_our_own_results_needs_nothing(own_project):
    for command in (
        INFERENCE,
        EVALUATE,
        ("train", *SPEC),
        ("translate", *SPEC, "-o", "x.py"),
        IN_THE_WAY["weights"][0],
    ):
        for _ in range(2):
            ended = run_here(own_project, *command, fork=command[0] != "train")
            assert ended.status == 0, ended.message


def test_the_spec_among_the_results_can_be_run_again(own_project):
    assert run_here(own_project, *EVALUATE).status == 0
    spec = own_project / "results/evaluate/experiment.yaml"
    before = spec.read_text()
    ended = run_here(own_project, "evaluate", "-e", str(spec))
    assert ended.status == 0, ended.message
    assert spec.read_text() == before


def test_foreign_temporary_files_stay(own_project):
    folder = own_project / "results/train"
    folder.mkdir(parents=True)
    names = (".tmp-1-model_epoch_000.pth", ".tmp-99999-last_checkpoint", ".tmp-1-curve_loss.png")
    for name in names:
        (folder / name).write_text("mine")
    leftover = folder / ".ddetr_mm-00112233445566aa.tmp.png"
    leftover.write_text("half a picture of a killed run")
    assert run_here(own_project, "train", *SPEC, fork=False).status == 0
    assert all((folder / name).read_text() == "mine" for name in names) and not leftover.exists()


@pytest.mark.parametrize("length", [250, 255])
def test_pictures_with_the_longest_names(length, own_project):
    source = own_project / "data/val/images/00000.png"
    folder = own_project / "long"
    folder.mkdir()
    name = "n" * (length - 4) + ".png"
    shutil.copy(source, folder / name)
    ended = run_here(own_project, *INFERENCE, "dataset.infer_data_sources.image_dir=[long]")
    assert ended.status == 0, ended.message
    results = own_project / "results/inference"
    assert (results / "images_annotated" / name).is_file()
    assert (results / "labels" / f"{name[:-4]}.txt").is_file()


@pytest.mark.parametrize("second", ["train", "evaluate"])
def test_a_second_run_in_one_folder_is_refused(second, own_project):
    hold = (
        "import sys, time\nfrom ddetr_mm.outputs import only_writer\n"
        "with only_writer(sys.argv[1], 'ddetr-mm train'):\n print('in', flush=True)\n time.sleep(120)\n"
    )
    folder = own_project / "results" / second
    folder.mkdir(parents=True)
    first = subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None and first.stdout.readline() == "in\n"
        ended = run_here(own_project, *{"train": ("train", *SPEC), "evaluate": EVALUATE}[second])
        assert_told(ended, "another run writes to this folder", f"process {first.pid}")
        assert not (folder / "status.json").exists()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
