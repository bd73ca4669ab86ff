"""The part of a check with a network: ground truth through the pipeline, one step, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import ddetr_mm.register  # noqa: F401 - before mmdet
from ddetr_mm.cli import main
from ddetr_mm.preflight import network, round_trip
from ddetr_mm.preflight.inputs import Split
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.runner import config_source, register_scope


def network_of(data_set, *overrides: str):
    """The config, spec and detector of a data set's spec, with its splits."""
    from mmengine.config import Config

    loaded = load_spec(data_set.spec, list(overrides), "train")
    config = Config.fromstring(config_source(loaded, "train"), ".py")
    register_scope(config)
    folder = data_set.folder
    splits = [
        Split.read(name, [dict(image_dir=str(folder / name), json_file=str(folder / f"{name}.json"))])
        for name in ("train", "val")
    ]
    return config, loaded.spec, network.build_network(config, loaded.spec), splits


def test_the_whole_check_through_the_command(data_set, capsys):
    assert main(["check", "-e", data_set.spec, "--full"]) == 0
    report = json.loads((data_set.folder / "results" / "train" / "check.json").read_text())
    sections = {section["title"]: section for section in report["sections"]}
    for name in ("train", "val"):
        assert sections[f"ground truth of {name} through the pipeline"]["data"]["AP"] == pytest.approx(
            1, abs=1e-4
        )
        sheet = Image.open(data_set.folder / "results" / "train" / f"check_batches_{name}.png")
        assert len(sheet.convert("RGB").getcolors(1 << 22)) > 200
    step = sections["one training step"]["data"]
    assert step["losses"]["loss"] > 0 and step["num_frozen"] > 0
    assert sections["memory"]["data"]["needed_bytes"] > sections["memory"]["data"]["fixed_bytes"] > 1 << 20
    assert sections["disk"]["data"]["num_checkpoints"] == 2
    assert report["passed"] and report["problems"] == [] and report["not_done"] == []
    assert "the run can start" in capsys.readouterr().out


def test_evaluation_without_training_data(data_set, capsys):
    folder = data_set.folder
    source = f"{{image_dir: {folder / 'val'}, json_file: {folder / 'val.json'}}}"
    overrides = [f"dataset.test_data_sources={source}", "dataset.train_data_sources=null"]
    assert (
        main(["check", "--for", "evaluate", "-e", data_set.spec, "evaluate.checkpoint=no.pth", *overrides])
        == 2
    )
    assert "no.pth" in capsys.readouterr().err
    report = json.loads((folder / "results" / "evaluate" / "check.json").read_text())
    assert [one["kind"] for one in report["findings"] if one["weight"] == "fault"] == ["file-missing"]
    assert report["not_done"] and list(report["splits"]) == ["test"]


def test_crowds_do_not_lower_the_score(data_set):
    document = data_set.read("val")
    for item in document["annotations"][::4]:
        item["iscrowd"] = 1
    data_set.write("val", document)
    config, _, model, _ = network_of(data_set)
    trip = round_trip.send_ground_truth(model, config.val_dataloader, config.val_evaluator, range(30))
    assert pytest.approx(1, abs=1e-4) == trip.AP
    assert trip.num_boxes == len(document["annotations"]) - len(document["annotations"][::4])


def test_a_transform_that_forgets_the_boxes_is_caught(data_set):
    from mmcv.transforms import BaseTransform
    from mmdet.registry import TRANSFORMS

    @TRANSFORMS.register_module(name="MirrorsTheImageOnly", force=True)
    class MirrorsTheImageOnly(BaseTransform):
        def transform(self, results):
            results["img"] = np.ascontiguousarray(results["img"][:, ::-1])
            results["img_shape"] = results["img"].shape[:2]
            results["scale_factor"] = (1.1, 1.0)
            return results

    config, _, model, splits = network_of(data_set)
    config.val_dataloader.dataset.pipeline.insert(-1, dict(type="MirrorsTheImageOnly"))
    sections = list(
        network.check_round_trip(
            model, splits[1], config.val_dataloader, config.val_evaluator, data_set.folder, full=False
        )
    )
    assert [finding.kind for finding in sections[0].findings] == ["ground-truth-scores-low"]
    assert "moves, drops or renames boxes" in str(sections[0].findings[0].problem)


def test_boxes_beyond_their_images_lower_what_can_be_reached(data_set):
    data_set.change_boxes("val", lambda box: [box[0], box[1], box[2] * 2.2, box[3]])
    config, _, model, _ = network_of(data_set)
    trip = round_trip.send_ground_truth(model, config.val_dataloader, config.val_evaluator, range(30))
    assert pytest.approx(trip.reachable_AP, abs=0.02) == trip.AP and trip.reachable_AP < 0.99
    assert [one.kind for one in round_trip.judge("val", trip, 100).findings] == ["perfect-score-unreachable"]


def test_more_objects_than_queries_are_reported(data_set):
    config, _, model, splits = network_of(data_set, "model.num_queries=2", "model.num_select=2")
    sections = list(
        network.check_round_trip(
            model, splits[1], config.val_dataloader, config.val_evaluator, data_set.folder, full=False
        )
    )
    assert [finding.kind for finding in sections[0].findings] == ["objects-beyond-limit"]


def first_batch(config):
    from mmengine.runner import Runner

    return next(iter(Runner.build_dataloader(config.train_dataloader)))


def test_gradients_of_a_real_step(data_set):
    config, spec, model, _ = network_of(data_set, "train.freeze=[transformer.encoder]")
    step = network.take_step(model, config.optim_wrapper, first_batch(config))
    assert step.bad_gradient == step.without_gradient == step.moved_though_frozen == []
    assert step.num_trained > 50 and step.num_frozen > 10 and step.kept_bytes > 1 << 20
    assert network.would_train(model, config, spec) == []
    assert network.judge(step, []).findings == []


def test_planted_gradient_faults_are_named(data_set):
    config, spec, model, _ = network_of(data_set, "train.freeze=[transformer.encoder]")
    model.neck.extra = nn.Parameter(torch.zeros(3))  # used by nothing
    model.encoder.layers[0].self_attn.value_proj.weight.requires_grad_(True)  # frozen by the spec
    model.query_embedding.weight.register_hook(lambda gradient: gradient * float("nan"))
    step = network.take_step(model, config.optim_wrapper, first_batch(config))
    section = network.judge(step, network.would_train(model, config, spec))
    told = {finding.kind: str(finding.problem) for finding in section.findings}
    assert set(told) == {"gradient-missing", "gradient-not-finite", "freeze-without-effect"}
    assert "neck.extra" in told["gradient-missing"]
    assert "query_embedding.weight" in told["gradient-not-finite"]
    assert "value_proj" in told["freeze-without-effect"]


def enlarged(batch, times: int):
    """The batch with its images repeated, so that they are ``times`` as wide and high."""
    samples = [sample.clone() for sample in batch["data_samples"]]
    for sample in samples:
        height, width = sample.img_shape
        sample.set_metainfo(dict(img_shape=(times * height, times * width)))
    return dict(inputs=[image.repeat(1, times, times) for image in batch["inputs"]], data_samples=samples)


def test_kept_memory_grows_with_the_pixels(data_set):
    config, _, model, _ = network_of(data_set)
    batch = first_batch(config)
    small = network.take_step(model, config.optim_wrapper, enlarged(batch, 3))
    large = network.take_step(model, config.optim_wrapper, enlarged(batch, 6))
    pixels = np.prod(large.batch_hw) / np.prod(small.batch_hw)
    assert pixels >= 3.5
    assert large.kept_bytes == pytest.approx(small.kept_bytes * pixels, rel=0.15)


def test_the_contact_sheet_undoes_the_normalisation(data_set, tmp_path):
    from ddetr_mm.preflight.pictures import tiles_of_batch

    config, _, model, _ = network_of(data_set)
    batch = first_batch(config)
    prepared = model.data_preprocessor(batch, True)
    tiles = tiles_of_batch(
        prepared["inputs"], prepared["data_samples"], model.data_preprocessor, ["background", "car", "person"]
    )
    original = batch["inputs"][0].permute(1, 2, 0).numpy()[..., ::-1]
    height, width = original.shape[:2]
    shown = np.asarray(tiles[0].picture)[:height, :width]
    assert np.abs(shown.astype(int) - original.astype(int)).max() <= 1
    assert set(tiles[0].names) <= {"car", "person"} and len(tiles[0].names) == len(tiles[0].boxes_xyxy)
    assert Path(str(batch["data_samples"][0].img_path)).name in tiles[0].title
