"""Recipes under configs/: each config equals that of its spec, and mim's metadata are correct."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mmdet.registry import MODELS
from mmengine.config import Config

import ddetr_mm.register  # noqa: F401 - registers what the configs name
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.runner import look_up_channels
from ddetr_mm.translate import to_config

REPO = Path(__file__).resolve().parents[2]
INDEX = REPO / "model-index.yml"
if not INDEX.is_file():
    pytest.skip("this is no checkout", allow_module_level=True)

METAFILES = [REPO / name for name in yaml.safe_load(INDEX.read_text(encoding="utf-8"))["Import"]]
RECIPES = {
    model["Name"]: model
    for file in METAFILES
    for model in yaml.safe_load(file.read_text(encoding="utf-8"))["Models"]
}
TWINS = [name for name, model in RECIPES.items() if "Spec" in model["Metadata"]]
# The spec names the folder of results; for a config mmdet's tools choose it.
ONLY_IN_SPECS = {"work_dir"}
# Names that the pieces share among their sections.
HELPERS = {
    "train_sources",
    "val_sources",
    "num_columns",
    "multi_scale",
    "crop_first",
    "attention",
    "feed_forward",
    "layers",
}


def recipe(name: str) -> dict:
    return Config.fromfile(str(REPO / RECIPES[name]["Config"])).to_dict()


def twin(name: str) -> dict:
    loaded = load_spec(REPO / RECIPES[name]["Metadata"]["Spec"], [], "train")
    return to_config(loaded, "train", look_up_channels=look_up_channels).to_dict()


def flat(value, path=""):
    """``{dotted path: leaf}``: tuples count as lists, floats to twelve digits; an empty one is a leaf."""
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, (list, tuple)) and value:
        items = enumerate(value)
    elif isinstance(value, float):
        return {path: f"{value:.12g}"}
    else:
        return {path: [] if isinstance(value, tuple) else value}
    return {key: leaf for name, item in items for key, leaf in flat(item, f"{path}.{name}").items()}


@pytest.mark.parametrize("name", TWINS)
def test_recipe_and_spec_are_the_same_run(name):
    built, translated = recipe(name), twin(name)
    assert set(translated) - set(built) == ONLY_IN_SPECS
    assert set(built) - set(translated) <= HELPERS
    for section in set(translated) & set(built):
        assert flat(built[section]) == flat(translated[section]), section


def test_recipe_and_spec_build_the_same_network():
    name = "deformable-detr-refine_r50_1xb8-300e_bccd"
    shapes = [
        {key: tuple(value.shape) for key, value in MODELS.build(config["model"]).state_dict().items()}
        for config in (recipe(name), twin(name))
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["bbox_head.cls_branches.0.weight"] == (4, 256)


def test_a_planted_difference_is_found():
    built = recipe(TWINS[0])
    changed = recipe(TWINS[0])
    changed["model"]["decoder"]["layer_cfg"]["ffn_cfg"]["ffn_drop"] = 0.2
    assert flat(built["model"]) != flat(changed["model"])


def test_every_recipe_is_listed_once_and_every_listed_file_exists():
    listed = [REPO / model["Config"] for model in RECIPES.values()]
    there = {path for folder in METAFILES for path in folder.parent.glob("*.py")}
    assert set(listed) == there and len(listed) == len(there)
    specs = {REPO / RECIPES[name]["Metadata"]["Spec"] for name in TWINS}
    assert specs >= set((REPO / "configs" / "specs").glob("*_coco.yaml"))
    assert all(path.is_file() for path in specs)


@pytest.mark.parametrize("file", METAFILES, ids=lambda path: path.parent.name)
def test_metafile_is_whole_and_claims_no_weights(file):
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    collections = {collection["Name"]: collection for collection in content["Collections"]}
    for collection in collections.values():
        assert collection["Paper"]["URL"].startswith("https://arxiv.org/abs/")
        assert "README" not in collection or (REPO / collection["README"]).is_file()
    for model in content["Models"]:
        assert model["In Collection"] in collections
        assert Path(model["Config"]).stem == model["Name"]
        assert not {"Weights", "Results"} & set(model)


@pytest.mark.parametrize("name", TWINS)
def test_metadata_are_those_of_the_config(name):
    config, metadata = recipe(name), RECIPES[name]["Metadata"]
    ranks = int(name.rpartition("_")[0].rpartition("_")[2].partition("xb")[0])
    assert metadata["Epochs"] == config["train_cfg"]["max_epochs"]
    assert metadata["Batch Size"] == ranks * config["train_dataloader"]["batch_size"]
    loaded = load_spec(REPO / metadata["Spec"], [], "train")
    assert loaded.spec.train.num_gpus == ranks
