"""``train.freeze`` and the groups of learning rates, by the names of TAO's parameters."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import GOLDEN
from mmdet.registry import MODELS
from torch import nn

from ddetr_mm.errors import SpecError
from ddetr_mm.spec import load_spec
from ddetr_mm.translate import to_config
from ddetr_mm.translate.model import parameters_below, taos_parameter_names, whole_modules

PREFIX = "model.model."
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
NEW_IN_TWO_STAGES = ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm")


@pytest.fixture
def translate(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Translate a training spec of overrides."""

    def run(*overrides: str, subtask: str = "train") -> dict[str, Any]:
        path = tmp_path / "spec.yaml"
        path.write_text("dataset: {train_data_sources: [{image_dir: /a, json_file: /a.json}]}\n")
        test = "dataset.test_data_sources={image_dir: /a, json_file: /a.json}"
        given = {"train": (), "evaluate": ("evaluate.checkpoint=x.pth", test)}[subtask]
        val = "dataset.val_data_sources=[{image_dir: /a, json_file: /a.json}]"
        return to_config(load_spec(path, [val, *given, *overrides], subtask), subtask).to_dict()

    return run


def tensors_of_keys(name: str, *, refine: bool, two_stage: bool) -> dict[str, str]:
    """Every parameter name in TAO's module tree → the name of its tensor, from a golden key list.

    The lists are of refined boxes without a second stage; the others follow from the original's constructor.
    """
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    keys = [key.removeprefix(PREFIX) for key in golden["state_dict"] if not key.endswith(BUFFERS)]
    keys = [key for key in keys if not key.startswith("transformer.decoder.bbox_embed")]
    if two_stage:
        keys = [key for key in keys if not key.startswith(("query_embed", "transformer.reference_points"))]
        keys += [f"transformer.{part}.{leaf}" for part in NEW_IN_TWO_STAGES for leaf in ("weight", "bias")]
        keys += [key.replace("_embed.1.", "_embed.2.") for key in keys if "_embed.1." in key]
    tensors = {key: key for key in keys}
    heads = [key for key in keys if key.startswith(("class_embed", "bbox_embed"))]
    if not refine:
        tensors |= {key: ".".join([key.split(".")[0], "0", *key.split(".")[2:]]) for key in heads}
    for head, is_shared in (("bbox_embed", refine), ("class_embed", two_stage)):
        if is_shared:
            shared = [key for key in heads if key.startswith(head)]
            tensors |= {f"transformer.decoder.{key}": tensors[key] for key in shared}
    return tensors


def small_network(translate: Callable[..., dict[str, Any]], golden: str, refine: bool, two_stage: bool):
    """The network of a golden file, as a config."""
    config = translate(
        f"model.backbone={json.loads((GOLDEN / f'{golden}.json').read_text())['model']['backbone']}",
        "model.enc_layers=2",
        "model.dec_layers=2",
        "model.dim_feedforward=128",
        "model.num_queries=20",
        f"model.with_box_refine={refine}",
    )["model"]
    return config | dict(as_two_stage=two_stage)


@pytest.mark.parametrize("two_stage", [False, True])
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("golden", ["resnet50_4lvl", "gc_vit_xxtiny_4lvl"])
def test_each_name_freezes_what_it_freezes_in_tao(translate, golden: str, refine: bool, two_stage: bool):
    """Every module and parameter of TAO's, as found in the key list of a checkpoint."""
    config = small_network(translate, golden, refine, two_stage)
    names = taos_parameter_names(config)
    network = MODELS.build(config)
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    tensors = tensors_of_keys(golden, refine=refine, two_stage=two_stage)
    assert {taos for several in names.values() for taos in several} == tensors.keys()

    @cache
    def tensor_of(ours: str) -> str:
        return tensors[names[ours][0]]

    for name in {part for key in tensors for part in prefixes(key)}:
        expected = {tensor for key, tensor in tensors.items() if f"{key}.".startswith(f"{name}.")}
        for part in whole_modules(parameters_below(name, names), names):
            network._freeze(part.rstrip("."))
        found = {tensor_of(ours) for ours, one in parameters.items() if not one.requires_grad}
        assert found == expected, name
        for parameter in network.parameters():
            parameter.requires_grad_(True)


def prefixes(key: str) -> Iterator[str]:
    """``a.b.c`` → ``a``, ``a.b``, ``a.b.c``."""
    parts = key.split(".")
    return (".".join(parts[:number]) for number in range(1, len(parts) + 1))


def trained(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_the_transformer_takes_the_shared_box_heads_along(translate):
    config = translate("train.freeze=[transformer]", "model.with_box_refine=True")["model"]
    assert set(config["frozen_modules"]) == {
        *("encoder", "decoder", "level_embed", "reference_points_fc", "bbox_head.reg_branches")
    }
    left = {name.split(".")[0] for name in trained(MODELS.build(config))}
    assert left == {"backbone", "neck", "query_embedding", "bbox_head"}
    free = translate("train.freeze=[transformer]")["model"]["frozen_modules"]
    assert (
        "bbox_head.reg_branches"
        not in translate("train.freeze=[transformer]", "model.with_box_refine=False")["model"][
            "frozen_modules"
        ]
    ), free


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("transformer.decoder.layers.0.linear1", ["decoder.layers.0.ffn.layers.0"]),
        ("transformer.decoder.layers.1.norm2", ["decoder.layers.1.norms.0"]),
        ("input_proj", ["neck"]),
        ("input_proj.2", ["neck.convs.2"]),
        ("input_proj.3", ["neck.extra_convs"]),
        ("input_proj.3.0", ["neck.extra_convs.0.conv"]),
        ("transformer.decoder.bbox_embed", ["bbox_head.reg_branches"]),
        ("transformer.decoder.bbox_embed.1", ["bbox_head.reg_branches.1"]),
        ("bbox_embed", ["bbox_head.reg_branches"]),
        ("class_embed.0", ["bbox_head.cls_branches.0"]),
        ("query_embed", ["query_embedding"]),
        ("transformer.level_embed", ["level_embed"]),
        ("transformer.reference_points", ["reference_points_fc"]),
        ("backbone", ["backbone"]),
        ("backbone.0", ["backbone"]),
        ("backbone.0.body.layer4", ["backbone.layer4"]),
        ("model.model.transformer.encoder", ["encoder"]),
        # Names of the mmdet detector.
        ("neck", ["neck"]),
        ("decoder.layers.0", ["decoder.layers.0"]),
    ],
)
def test_taos_names_become_ours(translate, name: str, frozen: list[str]):
    config = translate(
        f"train.freeze=[{name}]", "model.enc_layers=2", "model.dec_layers=2", "model.with_box_refine=True"
    )
    assert config["model"]["frozen_modules"] == frozen


def test_a_shared_head_is_frozen_by_any_of_its_names(translate):
    config = translate("train.freeze=[class_embed.1]", "model.with_box_refine=False", "model.dec_layers=2")
    assert config["model"]["frozen_modules"] == ["bbox_head.cls_branches.1"]
    assert not any("cls_branches" in name for name in trained(MODELS.build(config["model"])))


def test_names_that_fit_nothing_are_refused_with_the_nearest(translate):
    with pytest.raises(SpecError) as raised:
        translate("train.freeze=[backbone, transformer.enocder, input_proj.9, zzz]", "model.enc_layers=1")
    first, second, third = map(str, raised.value.problems)
    assert "spec.yaml: train.freeze[1], override: names no part of the network" in first
    assert "did you mean transformer.encoder" in first
    assert "input_proj.9" in second and "did you mean input_proj" in second
    assert "zzz" in third and "give names such as" in third
    # Without refinement TAO's decoder has no box heads.
    with pytest.raises(SpecError, match=r"transformer.decoder.bbox_embed"):
        translate("train.freeze=[transformer.decoder.bbox_embed]", "model.with_box_refine=False")


def test_other_subtasks_do_not_read_the_names(translate):
    assert translate("train.freeze=[zzz]", subtask="evaluate")["model"]["frozen_modules"] == []


def test_the_random_generator_is_left_alone(translate):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    translate("train.freeze=[backbone]", "model.enc_layers=1", "model.dec_layers=1")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "keyword", ["linear1", "bbox_embed", "decoder.layers.1", "input_proj.3", "norm2", "bias"]
)
@pytest.mark.parametrize("refine", [False, True])
def test_keywords_of_a_group_select_as_in_tao(translate, keyword: str, refine: bool):
    config = translate(
        f"model.linear_proj_names=[{keyword}]",
        "model.enc_layers=2",
        "model.dec_layers=2",
        "train.optim.lr_linear_proj_mult=0.125",
        "train.optim.lr_backbone=2e-4",
        "train.optim.lr=2e-4",
        f"model.with_box_refine={refine}",
    )
    keys = {
        key for key, one in config["optim_wrapper"]["paramwise_cfg"]["custom_keys"].items()
        if one["lr_mult"] == 0.125
    }  # fmt: skip
    names = taos_parameter_names(config["model"])
    chosen = {ours for ours in names if any(key in ours for key in keys)}
    assert chosen == {ours for ours, taos in names.items() if any(keyword in name for name in taos)}
    assert chosen


def test_a_keyword_without_parameters_is_reported(tmp_path: Path):
    path = tmp_path / "spec.yaml"
    path.write_text(
        "dataset:\n  train_data_sources: [{image_dir: /a, json_file: /a.json}]\n"
        "  val_data_sources: [{image_dir: /a, json_file: /a.json}]\n"
        "model: {enc_layers: 1, dec_layers: 1, linear_proj_names: [reference_points, offset_sampling]}\n"
    )
    draft = to_config(load_spec(path, [], "train"), "train")
    assert draft.notes == ["model.linear_proj_names: no parameter's name contains 'offset_sampling'"]
