"""Dictionaries of tensors at any depth, and which of several sets of weights is read."""

from __future__ import annotations

import functools

import pytest
import torch
from mmengine.hooks import EMAHook
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from weights_builders import detector, small_canonical, write_mmdet

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import Selection, convert_checkpoint, load_for_model, read_checkpoint
from ddetr_mm.weights.formats import HF, OFFICIAL, TAO, from_canonical

TABLES = {"official": OFFICIAL, "tao": TAO, "hf": HF}


@functools.cache
def weights(format_name: str = "official", seed: int = 0) -> dict[str, Tensor]:
    """A small whole network under a format's names."""
    canonical = small_canonical(seed=seed, counters=False)
    if format_name == "mmdet":
        return canonical
    return from_canonical(canonical, TABLES[format_name], with_box_refine=True, two_stage=False)[0]


def write(folder, content, name="x.pth"):
    torch.save(content, folder / name)
    return folder / name


def seed_of(checkpoint) -> int:
    """Which of the networks of :func:`weights` was read: every tensor must be of one seed."""
    seeds = [
        seed
        for seed in (0, 1, 2)
        if all(
            torch.equal(checkpoint.state_dict[key], value)
            for key, value in small_canonical(seed=seed, counters=False).items()
        )
    ]
    (seed,) = seeds
    return seed


# --- Containers ---

PLACES = [
    (),
    ("state_dict",),
    ("model",),
    ("weights",),
    ("net",),
    ("params",),
    ("checkpoint",),
    ("model_state_dict",),
    ("module",),
    ("anything at all",),
    ("state_dict", "model"),
    ("checkpoint", "model", "state_dict"),
    ("result", "run", "0", "best", "net"),
]


@pytest.mark.parametrize("place", PLACES, ids=".".join)
@pytest.mark.parametrize("format_name", ["mmdet", "tao", "official", "hf"])
def test_the_dictionary_of_tensors_is_found_at_any_depth(place, format_name, tmp_path):
    content = {**weights(format_name)}
    for name in reversed(place):
        content = {"epoch": 3, name: content, "args": None, "optimizer": {"state": {}}}
    checkpoint = read_checkpoint(write(tmp_path, content))
    assert checkpoint.format == format_name and seed_of(checkpoint) == 0
    assert checkpoint.entry == ".".join(place) and checkpoint.notes == []


PREFIXES = [
    "net.",
    "detector.",
    "model.detr.",
    "student.",
    "module.",
    "_orig_mod.",
    "model._orig_mod.",
    "module.detector.module.",
    "_forward_module.",
    "_fsdp_wrapped_module.net.",
    "lightning_module.model.model.",
    "0.1.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("format_name", ["mmdet", "tao", "official", "hf"])
def test_the_prefix_is_where_most_expected_names_are(prefix, format_name, tmp_path):
    """Among keys of other modules, in Lightning's container and alone."""
    content = {prefix + key: value for key, value in weights(format_name).items()}
    content |= {"criterion.empty_weight": torch.ones(3), "metric.total": torch.ones(1)}
    for wrapped in ({"state_dict": content, "pytorch-lightning_version": "2.0.0"}, content):
        checkpoint = read_checkpoint(write(tmp_path, wrapped))
        # Below model. and model.model. the original's names are those of TAO.
        is_taos = prefix in ("model._orig_mod.", "lightning_module.model.model.")
        usual = "tao" if format_name == "official" and is_taos else format_name
        assert checkpoint.format == usual and seed_of(checkpoint) == 0
        assert checkpoint.trace.unexpected == ["criterion.empty_weight", "metric.total"]


def test_values_that_are_no_tensors_are_passed_over(tmp_path):
    content = {**weights(), "epoch": 3, "loss": None, "name": "run", "transformer.mask": None, "list": [1, 2]}
    checkpoint = read_checkpoint(write(tmp_path, {"model": content}))
    assert seed_of(checkpoint) == 0 and checkpoint.trace.unexpected == []


def test_lists_tuples_and_namespaces_are_looked_into(tmp_path):
    import argparse

    for content in ([weights()], (3, {"x": weights()}), {"a": argparse.Namespace(net=weights())}):
        assert seed_of(read_checkpoint(write(tmp_path, content))) == 0


def test_parts_of_one_network_in_dictionaries_of_their_own_are_joined(tmp_path):
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in weights().items():
        first, _, rest = key.partition(".")
        parts.setdefault(first, {})[rest] = value
    checkpoint = read_checkpoint(write(tmp_path, {"networks": parts, "epoch": 1}))
    assert seed_of(checkpoint) == 0 and checkpoint.format == "official"


def test_optimizers_are_no_weights(tmp_path):
    """Adam's moments under the names of the parameters, as some optimizers keep them."""
    moments = {"exp_avg": weights(seed=1), "exp_avg_sq": weights(seed=2)}
    checkpoint = read_checkpoint(write(tmp_path, {"optimizer": moments, "model": weights()}))
    assert seed_of(checkpoint) == 0 and checkpoint.notes == []


def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {"model": weights()}
    content["self"] = content
    assert seed_of(read_checkpoint(write(tmp_path, content))) == 0


# --- Several sets ---


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("student", "teacher"), "student"),
        (("teacher", "student"), "student"),
        (("momentum_encoder", "online"), "online"),
        (("model", "model_old"), "model"),
        (("one", "two"), "one"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_the_first_that_is_no_copy_is_read_and_all_are_named(names, taken, inside, tmp_path):
    if inside:
        content = {f"{name}.{key}": v for i, name in enumerate(names) for key, v in weights(seed=i).items()}
    else:
        content = {name: weights(seed=i) for i, name in enumerate(names)}
    path = write(tmp_path, content)
    checkpoint = read_checkpoint(path)
    assert seed_of(checkpoint) == names.index(taken)
    (other,) = {*names} - {taken}
    assert f"2 sets of weights: '{taken}' is read" in checkpoint.notes[0]
    assert f"not '{other}'" in checkpoint.notes[0] and "checkpoint_entry" in checkpoint.notes[0]
    for index, name in enumerate(names):
        chosen = read_checkpoint(path, selection=Selection(name))
        assert seed_of(chosen) == index and "ddetr_mm.checkpoint_entry" in chosen.notes[0]
    if inside:
        assert set(checkpoint.trace.dropped) == {key for key in content if key.startswith(f"{other}.")}
        assert checkpoint.trace.unexpected == []


def test_an_entry_is_named_with_its_prefix_or_without(tmp_path):
    content = {"run": {"net": {f"module.a.{key}": value for key, value in weights().items()}}}
    content["run"]["other"] = weights(seed=1)
    path = write(tmp_path, content)
    for name in ("run.net", "run.net.a", "run.net.module.a"):
        assert seed_of(read_checkpoint(path, selection=Selection(name))) == 0
    assert seed_of(read_checkpoint(path, selection=Selection("run.other"))) == 1
    with pytest.raises(
        WeightsError, match=r"ddetr_mm.checkpoint_entry.*got 'run\.x'.*'run\.net\.a', 'run\.other'"
    ):
        read_checkpoint(path, selection=Selection("run.x"))


# --- Averages ---

AVERAGES = [
    ({"model": 0, "ema_model": 1}, "ema_model"),
    ({"model": 0, "model_ema": 1}, "model_ema"),
    ({"state_dict": 0, "state_dict_ema": 1}, "state_dict_ema"),
    ({"state_dict": 0, "ema_state_dict": 1}, "ema_state_dict"),
    ({"model": 0, "ema": {"module": 1, "updates": 7}}, "ema.module"),
    (
        {"state_dict": 0, "callbacks": {"EMACallback": {"ema_state_dict": 1}}},
        "callbacks.EMACallback.ema_state_dict",
    ),
    (
        {"state_dict": 0, "callbacks": {"EMA{'decay': 0.99}": {"weights": 1}}},
        "callbacks.EMA{'decay': 0.99}.weights",
    ),
    ({"model": 0, "averaged_model": 1}, "averaged_model"),
    ({"net": 0, "swa_state": 1}, "swa_state"),
    ({"module": 0, "moving_average": {"net": 1}}, "moving_average.net"),
]


def filled(content):
    if isinstance(content, int) and not isinstance(content, bool) and content < 3:
        return weights(seed=content)
    return {key: filled(value) for key, value in content.items()} if isinstance(content, dict) else content


@pytest.mark.parametrize(("content", "name"), AVERAGES, ids=[name for _content, name in AVERAGES])
def test_averaged_weights_are_read_and_said(content, name, tmp_path):
    path = write(tmp_path, {"epoch": 12, **filled(content)})
    for use_ema, seed in (("auto", 1), (True, 1), (False, 0)):
        checkpoint = read_checkpoint(path, selection=Selection(use_ema=use_ema))
        assert seed_of(checkpoint) == seed
        assert ("(averaged) is read" in checkpoint.notes[0]) == bool(seed)
        assert f"'{name}' (averaged)" in checkpoint.notes[0]


def test_averages_as_keys_of_one_dictionary(tmp_path):
    content = {
        f"{part}.{key}": v
        for i, part in enumerate(("model", "ema_model.module"))
        for key, v in weights(seed=i).items()
    }
    path = write(tmp_path, {"state_dict": content})
    assert seed_of(read_checkpoint(path)) == 1
    assert seed_of(read_checkpoint(path, selection=Selection(use_ema=False))) == 0


def test_a_file_of_an_average_alone_is_said_and_refused_where_another_is_wanted(tmp_path):
    path = write(tmp_path, {"ema": weights()})
    checkpoint = read_checkpoint(path)
    assert seed_of(checkpoint) == 0
    assert checkpoint.notes == ["averaged weights are read: 'ema'; the file has no others"]
    with pytest.raises(
        WeightsError, match=r"use_ema: the file has averaged weights only \(got 'false'\).*'ema'"
    ):
        read_checkpoint(path, selection=Selection(use_ema=False))
    with pytest.raises(
        WeightsError, match=r"use_ema: the file has no averaged weights \(got 'true'\).*'model'"
    ):
        read_checkpoint(write(tmp_path, {"model": weights()}), selection=Selection(use_ema=True))


def test_torchs_averaged_model_is_known_by_its_counter(tmp_path):
    model = detector(seed=1)
    path = write(tmp_path, AveragedModel(model).state_dict())
    checkpoint = read_checkpoint(path)
    assert checkpoint.notes[0].startswith("averaged weights are read")
    assert torch.equal(checkpoint.state_dict["level_embed"], model.level_embed)


def test_what_an_average_leaves_out_comes_from_the_last_step(tmp_path):
    left_out = ("backbone.0.body.bn1.weight", "transformer.level_embed")
    average = {key: value for key, value in weights(seed=1).items() if key not in left_out}
    checkpoint = read_checkpoint(write(tmp_path, {"model": weights(), "ema": average}))
    assert torch.equal(checkpoint.state_dict["level_embed"], weights()["transformer.level_embed"])
    key = "encoder.layers.0.norms.0.weight"
    assert torch.equal(checkpoint.state_dict[key], small_canonical(seed=1)[key])
    assert "2 tensors that the average leaves out" in checkpoint.notes[1]


def mmengine_file(folder):
    """A checkpoint as mmengine's EMAHook leaves it: it exchanges the two sets."""

    class Runner:
        model = detector(seed=1)

    hook = EMAHook()
    hook.before_run(Runner())
    with torch.no_grad():
        for parameter in hook.ema_model.module.parameters():
            parameter.add_(1)
    content = {"meta": {"mmengine_version": "0.10"}, "state_dict": {**Runner.model.state_dict()}}
    hook.before_save_checkpoint(Runner(), content)
    return write(folder, content), Runner.model


def test_mmengines_hook_exchanges_the_sets(tmp_path):
    path, model = mmengine_file(tmp_path)
    for use_ema, difference in (("auto", 1), (True, 1), (False, 0)):
        checkpoint = read_checkpoint(path, selection=Selection(use_ema=use_ema))
        assert torch.equal(checkpoint.state_dict["level_embed"], model.level_embed + difference)
        assert "'state_dict' (averaged)" in checkpoint.notes[0]
    other = detector(seed=2)
    report = load_for_model(other, path, strict=True)
    assert torch.equal(other.level_embed, model.level_embed + 1)
    assert "'state_dict' (averaged) is read" in report.notes[0]


def test_lightnings_weight_averaging_exchanges_the_sets(tmp_path):
    content = {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": weights("tao", seed=1),
        "current_model_state": weights("tao"),
        "averaging_state": {"n_averaged": torch.tensor(5)},
    }
    path = write(tmp_path, content)
    assert seed_of(read_checkpoint(path)) == 1
    assert seed_of(read_checkpoint(path, selection=Selection(use_ema=False))) == 0


# --- Keys that are not the network's ---


@pytest.mark.parametrize("to", ["mmdet", "tao", "official", "hf"])
def test_foreign_keys_pass_in_every_format(to, tmp_path):
    model = detector(backbone="resnet_18", seed=1)
    convert_checkpoint(
        write_mmdet(tmp_path / "x.pth", model.state_dict()), tmp_path / f"{to}.safetensors", to
    )
    from safetensors.torch import load_file

    content = load_file(tmp_path / f"{to}.safetensors")
    foreign = ["data_preprocessor.mean", "ema_decay", "teacher.head.weight", "criterion.empty_weight"]
    foreign.append("backbone_ema.bn.num_batches_tracked")
    path = write(tmp_path, {**content, **{key: torch.ones(3) for key in foreign}})
    refine = {"with_box_refine": True}
    torch.save({"state_dict": torch.load(path), "ddetr_mm": refine}, path)
    report = load_for_model(detector(backbone="resnet_18", seed=None), path, strict=True)
    assert report.source_format == to
    assert set(foreign) <= {*report.unexpected, *report.dropped}
    assert f"unexpected (not used), {len(report.unexpected)}" in report.summary()


class Wrapped(nn.Module):
    """A compiled and distributed network inside another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._forward_module = nn.Module()
        self._forward_module.net = nn.DataParallel(inner)


def test_modules_that_wrap_modules(tmp_path):
    model = detector(seed=1)
    model.encoder = torch.compile(model.encoder)
    path = write(tmp_path, Wrapped(model).state_dict())
    content = torch.load(path)
    assert any(key.startswith("_forward_module.net.module.encoder._orig_mod.layers") for key in content)
    other = detector(seed=2)
    report = load_for_model(other, path, strict=True)
    assert torch.equal(other.encoder.layers[0].norms[0].weight, model.encoder.layers[0].norms[0].weight)
    assert set(report.mapped) == set(content) and "below 'net.'" in report.notes[0]
