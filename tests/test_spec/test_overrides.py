"""``key=value`` on the command line."""

from __future__ import annotations

import pytest

from ddetr_mm.errors import SpecError
from ddetr_mm.spec import get_field
from ddetr_mm.spec.overrides import split_path

BASE = """
results_dir: /r
dataset:
  train_data_sources:
    - {image_dir: /a, json_file: /a.json}
    - {image_dir: /b, json_file: /b.json}
  test_data_sources: [{image_dir: /t, json_file: /t.json}]
train:
  optim: {lr_steps: [5, 7]}
inference:
  color_map: {car: blue}
ddetr_mm:
  backbone: {type: ResNet, depth: 50, out_indices: [1, 2]}
"""


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.num_epochs=20", "train.num_epochs", 20),
        ("+train.num_epochs=20", "train.num_epochs", 20),
        ("++train.num_epochs=20", "train.num_epochs", 20),
        (" train.num_epochs = 20 ", "train.num_epochs", 20),
        ("train.optim.lr=1e-4", "train.optim.lr", 1e-4),
        ("train.optim.lr_steps=[10,20]", "train.optim.lr_steps", [10, 20]),
        ("train.optim.lr_steps=[ 10, 20 ]", "train.optim.lr_steps", [10, 20]),
        ("train.optim.lr_steps.0=3", "train.optim.lr_steps", [3, 7]),
        ("train.optim.lr_steps[1]=9", "train.optim.lr_steps", [5, 9]),
        ("train.optim.lr_steps[2]=9", "train.optim.lr_steps", [5, 7, 9]),
        ("dataset.augmentation.scales.0=400", "dataset.augmentation.scales[0]", 400),
        ("dataset.augmentation.scales.0=400", "dataset.augmentation.scales[1]", 512),
        ("dataset.train_data_sources.0.image_dir=/x", "dataset.train_data_sources[0].image_dir", "/x"),
        ("dataset.train_data_sources[0].image_dir=/x", "dataset.train_data_sources[0].image_dir", "/x"),
        ("dataset.train_data_sources[1].image_dir=/x", "dataset.train_data_sources[0].image_dir", "/a"),
        (
            "dataset.train_data_sources=[{image_dir: /q, json_file: /q.json}]",
            "dataset.train_data_sources[0].json_file",
            "/q.json",
        ),
        (
            "dataset.train_data_sources=[{image_dir:/q,json_file:/q.json}]",
            "dataset.train_data_sources[0].json_file",
            "/q.json",
        ),
        ("dataset.test_data_sources.image_dir=/x", "dataset.test_data_sources.image_dir", "/x"),
        ("dataset.test_data_sources.image_dir=/x", "dataset.test_data_sources.json_file", "/t.json"),
        ("dataset.infer_data_sources.image_dir=/x", "dataset.infer_data_sources.image_dir", ["/x"]),
        (
            "dataset.infer_data_sources.image_dir=[/x,/y]",
            "dataset.infer_data_sources.image_dir",
            ["/x", "/y"],
        ),
        ("dataset.infer_data_sources.image_dir[0]=/x", "dataset.infer_data_sources.image_dir", ["/x"]),
        ("inference.color_map.person=red", "inference.color_map", {"car": "blue", "person": "red"}),
        (
            "inference.color_map.traffic.light=red",
            "inference.color_map",
            {"car": "blue", "traffic.light": "red"},
        ),
        ("inference.color_map.no entry=red", "inference.color_map", {"car": "blue", "no entry": "red"}),
        (
            "inference.color_map={person:red,car:'#f00'}",
            "inference.color_map",
            {"person": "red", "car": "#f00"},
        ),
        ("inference.color_map=null", "inference.color_map", None),
        ("model.backbone=gc_vit_tiny", "model.backbone", "gc_vit_tiny"),
        ("model.backbone=GC_ViT_tiny", "model.backbone", "gc_vit_tiny"),
        ("model.pretrained_model_path=/w.pth", "model.pretrained_backbone_path", "/w.pth"),
        ("train.optim.lr_monitor=train_loss", "train.optim.monitor_name", "train_loss"),
        ("train.optim={lr: 0.5, lr_decay: 0.5}", "train.optim.lr", 0.5),
        ("train.optim={lr: 0.5, lr_decay: 0.5}", "train.optim.lr_steps", [5, 7]),
        ("encryption_key=a=b=c", "encryption_key", "a=b=c"),
        ("encryption_key='a b'", "encryption_key", "a b"),
        ('encryption_key="a: b"', "encryption_key", "a: b"),
        ("encryption_key=a: b # c", "encryption_key", "a: b # c"),
        ("encryption_key=0123", "encryption_key", "0123"),
        ("encryption_key=@!%*&", "encryption_key", "@!%*&"),
        ("encryption_key=no", "encryption_key", "no"),
        ("encryption_key=null", "encryption_key", None),
        ("encryption_key='null'", "encryption_key", "null"),
        ("encryption_key=", "encryption_key", None),
        (
            "dataset.test_data_sources.json_file=*/a-*.json",
            "dataset.test_data_sources.json_file",
            "*/a-*.json",
        ),
        ("ddetr_mm.backbone.depth=18", "ddetr_mm.backbone.depth", 18),
        ("ddetr_mm.backbone.norm_cfg.type=BN", "ddetr_mm.backbone.norm_cfg", {"type": "BN"}),
        ("ddetr_mm.backbone.out_indices[1]=3", "ddetr_mm.backbone.out_indices", [1, 3]),
        ("ddetr_mm.backbone={type: Swin}", "ddetr_mm.backbone", {"type": "Swin"}),
    ],
)
def test_override(load, override: str, path: str, value: object):
    loaded = load(BASE, [override])
    assert get_field(loaded.spec, path) == value


def test_later_overrides_win_and_are_origins(load):
    loaded = load(BASE, ["train.num_epochs=20", "train.num_epochs=30"])
    assert loaded.spec.train.num_epochs == 30
    assert loaded.origin["train.num_epochs"] == "override"
    assert loaded.origin["train.optim.lr_steps"] == "line 9"
    assert "train.seed" not in loaded.origin


def test_appending_a_source(load):
    loaded = load(
        BASE,
        ["dataset.train_data_sources[2].image_dir=/c", "dataset.train_data_sources[2].json_file=/c.json"],
    )
    assert [source.image_dir for source in loaded.spec.dataset.train_data_sources] == ["/a", "/b", "/c"]
    assert loaded.origin["dataset.train_data_sources[2].json_file"] == "override"


def test_overrides_reach_a_single_source_where_a_list_belongs(load):
    text = "dataset: {val_data_sources: {image_dir: /a, json_file: /b}}"
    loaded = load(text, ["dataset.val_data_sources[0].image_dir=/x"])
    assert loaded.spec.dataset.val_data_sources[0].image_dir == "/x"
    assert loaded.spec.dataset.val_data_sources[0].json_file == "/b"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train.optim.lr", "=", "1e-4"], "write train.optim.lr=1e-4"),
        (["train.optim.lr", "=1e-4"], "write train.optim.lr=1e-4"),
        (["train.optim.lr=", "1e-4"], "write train.optim.lr=1e-4"),
        (["train.optim.lr_steps=[10,", "20]"], "write 'train.optim.lr_steps=[10, 20]'"),
        (["train.num_epochs=3", "train.optim.lr", "=", "1e-4"], "write train.optim.lr=1e-4"),
    ],
)
def test_an_override_split_at_its_spaces_is_one_error(load, arguments, hint):
    with pytest.raises(SpecError) as caught:
        load("results_dir: r", arguments)
    (problem,) = caught.value.problems
    assert problem.what == "was split at its spaces" and problem.hint == hint


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.num_epochs", ["is not an override", "key=value"]),
        ("", ["is not an override"]),
        ("=3", ["is not an override"]),
        ("train..num_epochs=3", ["is not an override"]),
        (".train=3", ["is not an override"]),
        ("train.num_epochs.=3", ["is not an override"]),
        ("[0]=3", ["is not an override"]),
        ("a]b=3", ["is not an override"]),
        ("~train.num_epochs=3", ["~train", "is not a key"]),
        ("train.num_epoch=3", ["train.num_epoch, override", "did you mean train.num_epochs?"]),
        ("num_queries=3", ["num_queries, override", "did you mean model.num_queries?"]),
        ("train.num_epochs=x", ["train.num_epochs, override", "'x'", "an integer"]),
        ("train.num_epochs.x=1", ["single value"]),
        ("train.optim.lr_steps.x=1", ["is not an item", "0 to 2"]),
        ("train.optim.lr_steps[5]=1", ["is not an item", "0 to 2"]),
        ("train.optim.lr_steps[-1]=1", ["is not an"]),
        ("train.optim.lr_steps[0].x=1", ["no keys below"]),
        ("train.optim.lr_steps=[1", ["not valid YAML", "train.optim.lr_steps, override", "quote"]),
        ("train.optim.lr_steps=1,2", ["is not a list", "write [1,2]"]),
        ("train.optim.lr_steps=[!!python/name:os.system x]", ["YAML tag is not allowed"]),
        ("train=3", ["train, override", "is not a section"]),
        ("ddetr_mm.backbone.depth.x=1", ["neither a mapping nor a list"]),
        ("inference.color_map.car=[1]", ["inference.color_map.car, override", "text"]),
        ("dataset.train_data_sources.0.imagedir=/x", ["did you mean", "image_dir"]),
    ],
)
def test_bad_override(problems, override: str, words: list[str]):
    message = "\n".join(problems(BASE, [override]))
    assert message
    assert all(word in message for word in words), message


def test_all_bad_overrides_are_reported_at_once(problems):
    found = problems(BASE, ["x", "train.y=1", "train.num_epochs=z", "model.nheads=3"])
    assert len(found) == 4


def test_a_bad_value_in_the_file_is_not_hidden_by_an_override_below_it(problems):
    assert "is not a section" in problems("train: 5", ["train.num_epochs=3"])[0]


def test_the_key_is_not_shown(problems):
    found = problems("", ["encryption_key=[secret, stuff]", 'encryption_key="secret'])
    assert len(found) == 2
    assert "secret" not in "\n".join(found)


@pytest.mark.parametrize(
    ("path", "steps"),
    [
        ("a", ["a"]),
        ("a.b[0].c", ["a", "b", "0", "c"]),
        ("a.0.c", ["a", "0", "c"]),
        ("a[0][1]", ["a", "0", "1"]),
        ("", None),
        ("a.", None),
        ("a[", None),
        ("a[x]", None),
        ("a[0]b", None),
    ],
)
def test_split_path(path: str, steps: list[str] | None):
    tokens = split_path(path)
    assert (tokens and [token.text for token in tokens]) == steps
