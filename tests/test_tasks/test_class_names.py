"""Classes by name between data, checkpoints, exported graphs and class maps, as a user runs the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ddetr_mm.errors import DataError
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.mmdet_tools import mmdet_checkpoint
from ddetr_mm.tasks.runner import config_source, predicted_names
from ddetr_mm.weights import inspect_checkpoint, read_checkpoint
from ddetr_mm.weights.class_columns import HEAD_KEY

from .conftest import Project


def document(project: Project, split: str) -> dict:
    """The annotations of a split whose conversion made several shards, as one document."""
    parts = [json.loads(path.read_text()) for path in project.results.glob(f"coco/{split}/**/*-of-*.json")]
    return {
        "images": [image for part in parts for image in part["images"]],
        "categories": parts[0]["categories"],
        "annotations": [box for part in parts for box in part["annotations"]],
    }


def renumbered(content: dict, new_ids: dict[str, int | str], path: Path) -> Path:
    """The document with other category ids for the same names."""
    ids = {entry["id"]: new_ids[entry["name"]] for entry in content["categories"]}
    content = content | {
        "categories": [{"id": ids[entry["id"]], "name": entry["name"]} for entry in content["categories"]],
        "annotations": [box | {"category_id": ids[box["category_id"]]} for box in content["annotations"]],
    }
    path.write_text(json.dumps(content))
    return path


OTHER_IDS = {"circle": 3, "rectangle": 1, "star": 4, "triangle": 2}


def named_predictions(folder: Path, names: dict[int, str]) -> list[tuple]:
    """File, box, score and class name of every detection of an evaluation."""
    found = json.loads((folder / "predictions.json").read_text())
    return sorted(
        (entry["image_id"], names[entry["category_id"]], round(entry["score"], 4), *map(round, entry["bbox"]))
        for entry in found
    )


@pytest.fixture(scope="module")
def project(trained_project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The trained project with its test split in one file, and the same with other ids."""
    content = document(trained_project, "test")
    folder = trained_project.folder
    own = {entry["name"]: entry["id"] for entry in content["categories"]}
    renumbered(content, own, folder / "same.json")
    renumbered(content, OTHER_IDS, folder / "other.json")
    renumbered(content, {name: f"id-{name}" for name in own}, folder / "texts.json")
    return trained_project


def evaluate(project: Project, json_file: str, *overrides: str, command=("evaluate",), status: int = 0):
    return project.run(
        *command,
        *("-e", project.spec),
        *_tiny(),
        f"evaluate.checkpoint={project.results}/train/dd_model_latest.pth",
        f"dataset.test_data_sources.json_file={json_file}",
        f"evaluate.results_dir={project.folder}/out-{json_file}",
        *overrides,
        status=status,
    )


def _tiny() -> tuple[str, ...]:
    from .conftest import TINY

    return TINY


def test_evaluation_follows_names_when_the_data_have_other_ids(project: Project):
    same = evaluate(project, "same.json")
    other = evaluate(project, "other.json")
    content = json.loads((project.folder / "same.json").read_text())
    own = {entry["id"]: entry["name"] for entry in content["categories"]}
    assert own != {number: name for name, number in OTHER_IDS.items()}
    expected = named_predictions(project.folder / "out-same.json", own)
    names = {number: name for name, number in OTHER_IDS.items()}
    assert named_predictions(project.folder / "out-other.json", names) == expected
    assert "moved by name" not in same.stderr
    assert "number the same classes differently: 4 are moved by name" in other.stderr


def test_check_says_what_evaluation_will_do(project: Project):
    done = evaluate(project, "other.json", command=("check", "--for", "evaluate"))
    assert "number the same classes differently: 4 are moved by name" in done.stdout


@pytest.mark.parametrize("command", [("evaluate",), ("check", "--for", "evaluate")])
def test_data_without_any_of_the_classes_are_refused(project: Project, command):
    content = json.loads((project.folder / "same.json").read_text())
    for entry in content["categories"]:
        entry["name"] = f"ship {entry['id']}"
    (project.folder / "ships.json").write_text(json.dumps(content))
    done = evaluate(project, "ships.json", command=command, status=2)
    assert "has none of the data's classes" in done.stderr + done.stdout


def test_a_run_does_not_resume_on_other_numbers(project: Project, tmp_path: Path):
    content = document(project, "train")
    renumbered(content, OTHER_IDS, tmp_path / "train.json")
    results = tmp_path / "results"
    shutil.copytree(project.results / "train", results / "train")
    sources = "{image_dir: results/shapes/data, json_file: %s}"
    done = project.tiny(
        "train",
        f"results_dir={results}",
        "train.num_epochs=3",
        f"dataset.train_data_sources=[{sources % (tmp_path / 'train.json')}]",
        f"dataset.val_data_sources=[{sources % (tmp_path / 'train.json')}]",
        status=2,
    )
    assert "cannot be resumed: the training data number their classes otherwise" in done.stderr
    assert "1 rectangle, 2 triangle, 3 circle, 4 star" in done.stderr
    assert "1 triangle, 2 star, 3 rectangle, 4 circle" in done.stderr


def test_mmdets_test_tool_gets_columns_of_the_data(project: Project, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(project.folder)
    checkpoint = str((project.results / "train/dd_model_latest.pth").resolve())
    found = {}
    for name in ("same", "other"):
        fields = [f"dataset.test_data_sources.json_file={name}.json", f"evaluate.checkpoint={checkpoint}"]
        loaded = load_spec(project.spec, [*_tiny(), *fields], "evaluate")
        config = tmp_path / f"{name}.py"
        config.write_text(config_source(loaded, "evaluate", checkpoint))
        found[name] = mmdet_checkpoint(checkpoint, tmp_path, config)
    assert found["same"] == Path(checkpoint)
    by_id = sorted(OTHER_IDS, key=OTHER_IDS.__getitem__)
    assert inspect_checkpoint(found["other"]).meta.class_names == ("background", *by_id)
    before, after = (read_checkpoint(found[name]).state_dict[HEAD_KEY] for name in ("same", "other"))
    own = inspect_checkpoint(checkpoint).meta.class_names
    assert after[1:].equal(before[[own.index(name) for name in by_id]])


# --- Names of results ---


def infer(project: Project, text: str, tmp_path: Path, status: int = 0, command=("inference",)):
    classmap = tmp_path / "classes.txt"
    classmap.write_text(text)
    return project.run(
        *command,
        *("-e", project.spec),
        *_tiny(),
        f"inference.checkpoint={project.results}/train/dd_model_latest.pth",
        f"inference.results_dir={tmp_path}/out",
        "inference.conf_threshold=0",
        "inference.color_map=null",
        f"dataset.infer_data_sources={{image_dir: results/shapes/data/test/images, classmap: {classmap}}}",
        status=status,
    )


def test_a_class_map_agrees_with_the_checkpoint_or_is_refused(project: Project, tmp_path: Path):
    done = infer(project, "triangle\n\nrectangle\n", tmp_path)
    names = {line.split()[0] for path in (tmp_path / "out/labels").iterdir() for line in path.open()}
    assert names and names <= {"triangle", "rectangle"}
    (line,) = [line for line in done.stderr.splitlines() if "the class map does not name" in line]
    log = [json.loads(text) for text in (tmp_path / "out/status.json").read_text().splitlines()]
    (entry,) = [entry for entry in log if "unnamed_objects" in entry]
    written = sum(len(path.read_text().splitlines()) for path in (tmp_path / "out/labels").iterdir())
    # All queries pass the threshold 0: 12 of each of 6 images.
    assert entry["unnamed_objects"] == 6 * 12 - written > 0
    assert line == f"note: {entry['message']}" and line.startswith(
        f"note: {entry['unnamed_objects']} objects"
    )
    shifted = "star\nrectangle\ncircle\ntriangle\n"
    for command in (("inference",), ("check", "--for", "inference")):
        done = infer(project, shifted, tmp_path, status=2, command=command)
        assert "category 1 is 'star' here and 'triangle' in the model (4 names differ)" in done.stderr


def names_of(project: Project, known: tuple[str, ...] | None, *overrides: str, subtask: str = "export"):
    """The class names of a subtask's results, without running it."""
    sources = f"[{{image_dir: {project.folder}, json_file: {project.folder}/same.json}}]"
    given = [f"dataset.val_data_sources={sources}", "dataset.train_data_sources=null"]
    given += ["export.checkpoint=x.pth", "export.onnx_file=x.onnx"]
    loaded = load_spec(project.spec, [*given, "inference.checkpoint=x.pth", *overrides], subtask)
    return predicted_names(loaded, subtask, known)


OWN = ("background", "triangle", "star", "rectangle", "circle")


def test_names_of_a_checkpoint_without_any(project: Project, tmp_path: Path, capsys):
    classmap = tmp_path / "classes.txt"
    classmap.write_text("a\n\nc\n")
    source = f"dataset.infer_data_sources={{image_dir: x, classmap: {classmap}}}"
    other = ("background", "x", "y", "z", "w")
    assert names_of(project, other) == other  # what the checkpoint says counts
    assert capsys.readouterr().err == ""
    assert names_of(project, None) == OWN
    assert "the names come from dataset.val_data_sources" in capsys.readouterr().err
    assert names_of(project, ("background", "unknown", "unknown", "unknown", "unknown")) == OWN
    assert names_of(project, None, source) == OWN
    no_data = "dataset.val_data_sources=null"
    assert names_of(project, None, source, no_data) == ("background", "a", "unknown", "c", "unknown")
    assert names_of(project, None, no_data) is None
    assert "warning: neither the checkpoint nor the spec's data name the classes" in capsys.readouterr().err
    # Inference writes the class map's names and no others.
    assert names_of(project, None, source, subtask="inference") is None
    classmap.write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(DataError, match="names 5 classes, the model has 4"):
        names_of(project, None, source, subtask="inference")


def test_names_of_data_follow_the_options_of_category_ids(project: Project, tmp_path: Path, capsys):
    data = "dataset.val_data_sources=[{{image_dir: {0}, json_file: {0}/{1}}}]".format
    texts = data(project.folder, "texts.json")
    assert names_of(project, None, texts) is None
    assert "cannot name the classes" in capsys.readouterr().err
    by_name = "ddetr_mm.category_ids=by_name"
    assert names_of(project, None, texts, by_name) == ("background", *sorted(OTHER_IDS))
    assert "the names come from the data, by ddetr_mm.category_ids" in capsys.readouterr().err
    assert names_of(project, None, texts, by_name, "dataset.num_classes=3") is None
    content = json.loads((project.folder / "same.json").read_text())
    content["categories"].append({"id": 9, "name": OWN[1]})
    (tmp_path / "twice.json").write_text(json.dumps(content))
    twice = data(tmp_path, "twice.json")
    assert names_of(project, None, twice) is None
    assert names_of(project, None, twice, "ddetr_mm.merge_categories=true") == OWN


def without_names(project: Project, path: Path) -> Path:
    """The trained network as TAO writes it: without metadata."""
    source = str(project.results / "train/dd_model_latest.pth")
    project.run("weights", source, str(path), "--to", "tao")
    content = torch.load(path, weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, path)
    assert inspect_checkpoint(path).meta.class_names is None
    return path


def test_a_checkpoint_of_tao_gets_its_names_from_the_data(project: Project, tmp_path: Path):
    checkpoint = without_names(project, tmp_path / "tao.pth")
    onnx, labels = tmp_path / "m.onnx", tmp_path / "labels.txt"
    given = [f"export.checkpoint={checkpoint}", f"export.onnx_file={onnx}", "export.serialize_nvdsinfer=true"]
    given += [f"export.results_dir={tmp_path}/export", "export.on_cpu=true"]
    command = ("export", "-e", project.spec, *_tiny(), *given)
    done = project.run(*command)
    assert labels.read_text().split() == list(OWN)
    assert "the names come from dataset.val_data_sources" in done.stderr
    # Nothing names the classes: said, and not hidden.
    nothing = ["dataset.val_data_sources=null", "dataset.train_data_sources=null"]
    done = project.run(*command, *nothing, "--force")
    assert labels.read_text().split() == ["background", *["unknown"] * 4]
    assert "neither the checkpoint nor the spec's data name the classes" in done.stderr
    infer = [
        f"inference.checkpoint={checkpoint}",
        f"inference.results_dir={tmp_path}/out",
        "inference.conf_threshold=0",
        "inference.color_map=null",
        "dataset.infer_data_sources={image_dir: results/shapes/data/test/images}",
    ]
    project.run("inference", "-e", project.spec, *_tiny(), *infer)
    names = {line.split()[0] for path in (tmp_path / "out/labels").iterdir() for line in path.open()}
    assert names and names <= set(OWN[1:])


def test_weights_with_a_spec_gets_the_names_too(project: Project, tmp_path: Path):
    checkpoint, spec = without_names(project, tmp_path / "tao.pth"), project.results / "train/experiment.yaml"
    project.run("weights", str(checkpoint), str(tmp_path / "ours.pth"), "--to", "mmdet", "-e", str(spec))
    assert inspect_checkpoint(tmp_path / "ours.pth").meta.class_names == OWN
    project.run("weights", str(checkpoint), str(tmp_path / "plain.pth"), "--to", "mmdet")
    assert inspect_checkpoint(tmp_path / "plain.pth").meta.class_names is None


# --- Ids by name ---


def test_a_run_by_name_from_training_to_evaluation(project: Project, tmp_path: Path):
    """Zero-based ids, texts and huge numbers in three files; the checkpoint keeps the numbers."""
    names = sorted(OTHER_IDS)
    ids_by_split = {"train": range(4), "val": "wxyz", "test": (2**62, 5_000_000, 9, 7)}
    train, val, test = (
        renumbered(document(project, split), dict(zip(names, ids, strict=True)), tmp_path / f"{split}.json")
        for split, ids in ids_by_split.items()
    )
    source = "{image_dir: results/shapes/data, json_file: %s}"
    data = [
        f"results_dir={tmp_path}/results",
        f"dataset.train_data_sources=[{source % train}]",
        f"dataset.val_data_sources=[{source % val}]",
        f"dataset.test_data_sources={source % test}",
    ]
    refused = project.tiny("train", *data, status=2)
    assert "set ddetr_mm.category_ids: by_name" in refused.stderr
    by_name = [*data, "ddetr_mm.category_ids=by_name"]
    project.run("check", "--for", "train", "--quick", "-e", project.spec, *_tiny(), *by_name)
    project.tiny("train", *by_name, "train.num_epochs=1", "train.validation_interval=1")
    ids = {"category_ids": {name: number for number, name in enumerate(names, start=1)}}
    assert json.loads((tmp_path / "results/train/category_ids.json").read_text()) == ids
    checkpoint = tmp_path / "results/train/dd_model_latest.pth"
    meta = inspect_checkpoint(checkpoint).meta
    assert meta.numbered_by_name and meta.class_names == ("background", *names)
    done = project.tiny("evaluate", *data, f"evaluate.checkpoint={checkpoint}")
    assert "moved by name" not in done.stderr
    assert json.loads((tmp_path / "results/evaluate/category_ids.json").read_text()) == ids
    results = json.loads((tmp_path / "results/evaluate/results_detail.json").read_text())
    assert [entry["name"] for entry in results["per_class"]] == names
