"""Exported graphs compute what the detector computes, with few nodes."""

from __future__ import annotations

import collections
import itertools
import json

import numpy as np
import onnx
import onnxslim
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.registry import init_default_scope

import ddetr_mm.register  # noqa: F401 - registers the detector
from ddetr_mm.deploy import graph_attention, onnx_export
from ddetr_mm.deploy.onnx_export import ExportOptions, usable_opset
from ddetr_mm.deploy.onnx_file import OUTPUT_NAMES, read_signature, require_sampling_for_tensorrt
from ddetr_mm.deploy.parity import BatchParity, ParityReport, compare_outputs, generated_images
from ddetr_mm.errors import ExportError
from ddetr_mm.spec import load_spec
from ddetr_mm.translate import to_config
from ddetr_mm.weights.gcvit import VARIANTS, GCViTVariant

LEVELS = {1: "[1]", 2: "[1,2]", 3: "[1,2,3]", 4: "[1,2,3,4]", 5: "[0,1,2,3,4]"}


def export_onnx(detector, path, log=lambda _: None, **options):
    """Export with these options, quietly."""
    return onnx_export.export_onnx(detector, path, ExportOptions(**options), log=log)


def tiny_config(tmp_path, levels="[1,2,3,4]", refine=True, gcvit=False, overrides=()):
    """The config of a small detector."""
    spec = tmp_path / "spec.yaml"
    spec.write_text("results_dir: results\n")
    stages = [stage for stage in json.loads(levels) if stage < 4]
    overrides = [
        f"model.num_feature_levels={len(json.loads(levels))}",
        f"model.return_interm_indices={levels}",
        f"model.with_box_refine={refine}",
        *("model.enc_layers=2", "model.dec_layers=3", "model.hidden_dim=64", "model.nheads=4"),
        *("model.num_queries=15", "model.num_select=15", "dataset.num_classes=6", "model.dim_feedforward=48"),
        "model.backbone=gc_vit_xxtiny"
        if gcvit
        else f"ddetr_mm.backbone={{type: ResNet, depth: 18, base_channels: 8, out_indices: {stages}}}",
        *overrides,
    ]
    loaded = load_spec(spec, overrides)
    channels = [8 * 2**stage for stage in stages]
    return to_config(loaded, "export", look_up_channels=lambda _: channels).to_dict()["model"]


def tiny_detector(tmp_path, num_levels=4, refine=True, two_stage=False, gcvit=False):
    """A small detector on the usual feature levels."""
    config = tiny_config(tmp_path, LEVELS[num_levels], refine, gcvit)
    config["as_two_stage"] = two_stage
    return with_random_weights(config)


def with_random_weights(config):
    """Build with random weights everywhere (offsets and boxes are zero at initialisation)."""
    init_default_scope("mmdet")
    torch.manual_seed(0)
    detector = MODELS.build(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if parameter.dim() > 1:
                scale = parameter[0].numel() ** -0.5 * (0.5 if "reg_branches" in name else 1.0)
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return detector


@pytest.mark.parametrize("num_levels", LEVELS)
@pytest.mark.parametrize("refine", [True, False])
def test_the_graph_equals_the_detector(tmp_path, num_levels, refine):
    detector = tiny_detector(tmp_path, num_levels, refine)
    report = export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(64, 96))
    assert [batch.batch_size for batch in report.batches] == [1, 2, 7]
    assert report.max_abs_diff_boxes < 1e-5 and report.max_abs_diff_logits < 1e-4
    written = json.loads((tmp_path / "m.parity.json").read_text())
    assert written["passed"] and written["max_abs_diff_boxes"] == report.max_abs_diff_boxes


@pytest.mark.slow  # a variant at its full depth; thin ones below
@pytest.mark.parametrize(("num_levels", "refine", "plugin"), [(4, True, False), (5, False, True)])
def test_a_graph_with_gcvit_equals_the_detector(tmp_path, num_levels, refine, plugin):
    detector = tiny_detector(tmp_path, num_levels, refine, gcvit=True)
    assert type(detector.backbone).__name__ == "GCViT"
    # Feature maps of 12x15 and 6x8 …: windows of 7 and 14 need padding.
    report = export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(48, 60), plugin=plugin)
    assert [batch.batch_size for batch in report.batches] == [1, 2, 7]
    assert report.max_abs_diff_boxes < 1e-4 and report.max_abs_diff_logits < 1e-3
    operators = {node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node}
    assert ("GridSample" in operators) is not plugin and not operators & {"Loop", "If", "NonZero"}


STAGES = [list(chosen) for count in (1, 2, 3, 4) for chosen in itertools.combinations(range(4), count)]
INDEX_LISTS = [str(stages + extra) for stages in STAGES for extra in ([], [4])]
# Every stage as the first and as the last, with and without a level more; the others are alike.
COMMON_INDEX_LISTS = ("[0]", "[3, 4]", "[1, 2]", "[0, 3]", "[2, 3, 4]", "[0, 1, 4]", "[0, 1, 2, 3, 4]")
SMALLEST = ("model.enc_layers=1", "model.dec_layers=1")


@pytest.mark.parametrize(
    "levels",
    [
        pytest.param(levels, marks=() if levels in COMMON_INDEX_LISTS else pytest.mark.slow)
        for levels in INDEX_LISTS
    ],
)
def test_a_graph_of_any_feature_levels_equals_the_detector(tmp_path, levels):
    detector = with_random_weights(tiny_config(tmp_path, levels, overrides=SMALLEST))
    last = max(stage for stage in json.loads(levels) if stage < 4)
    assert detector.backbone.res_layers == [f"layer{stage + 1}" for stage in range(last + 1)]
    report = export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(64, 64))
    assert report.max_abs_diff_boxes < 1e-5 and report.max_abs_diff_logits < 1e-4


@pytest.mark.parametrize(
    ("levels", "plugin"),
    [
        *(("[0]", False), ("[1,2,4]", True), ("[1,4]", False)),
        *(pytest.param(levels, False, marks=pytest.mark.slow) for levels in ("[0,2]", "[1,2,4]")),
    ],
)
def test_a_graph_of_any_feature_levels_of_gcvit_equals_the_detector(tmp_path, levels, plugin, monkeypatch):
    thin = GCViTVariant((2, 2, 2, 2), (1, 2, 4, 8), (7, 7, 14, 7), 32, 2.0, 0.5)
    monkeypatch.setitem(VARIANTS, "xxtiny", thin)
    detector = with_random_weights(tiny_config(tmp_path, levels, gcvit=True, overrides=SMALLEST))
    last = max(stage for stage in json.loads(levels) if stage < 4)
    assert len(detector.backbone.levels) == last + 1
    # Feature maps of 12x15 and 6x8 …: windows of 7 and 14 need padding.
    report = export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(48, 60), plugin=plugin)
    assert report.max_abs_diff_boxes < 1e-5 and report.max_abs_diff_logits < 1e-4


def test_names_types_and_axes_are_those_of_the_contract(tmp_path):
    detector = tiny_detector(tmp_path)
    export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(64, 96), opset=17)
    model = onnx.load(str(tmp_path / "m.onnx"))
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "inputs": ["batch", 3, 64, 96],
        "pred_logits": ["batch", 15, 6],
        "pred_boxes": ["batch", 15, 4],
    }
    assert [value.name for value in model.graph.output] == ["pred_logits", "pred_boxes"]
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {onnx.TensorProto.FLOAT}
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 17}


def test_only_standard_operators_and_no_shape_arithmetic(tmp_path):
    detector = tiny_detector(tmp_path)
    export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(64, 96))
    nodes = onnx.load(str(tmp_path / "m.onnx")).graph.node
    counts = collections.Counter(node.op_type for node in nodes)
    assert {node.domain for node in nodes} == {""}
    assert counts["GridSample"] == (2 + 3) * 4
    # The first queries are repeated for every image of the batch; nothing else asks for a shape.
    assert counts["Shape"] <= 1 and counts["NonZero"] == counts["Loop"] == counts["If"] == 0
    assert counts["Constant"] == counts["Identity"] == 0


def test_no_node_is_dead_or_stands_twice(tmp_path):
    export_onnx(tiny_detector(tmp_path), tmp_path / "m.onnx", input_size_hw=(64, 96))
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    assert all(read & set(node.output) for node in graph.node)
    assert {tensor.name for tensor in graph.initializer} <= read
    works = [
        (
            node.op_type,
            tuple(node.input),
            tuple(sorted(entry.SerializeToString() for entry in node.attribute)),
        )
        for node in graph.node
    ]
    assert len(set(works)) == len(works)


@pytest.mark.parametrize("plugin", [False, True])
def test_simplification_drops_nodes_and_keeps_the_outputs(tmp_path, monkeypatch, plugin):
    outputs, nodes, lines = [], [], []
    for name in ("simplified", "plain"):
        if name == "plain":
            monkeypatch.setattr(onnxslim, "slim", fail)
        path = tmp_path / f"{name}.onnx"
        detector = tiny_detector(tmp_path, 2)
        report = export_onnx(detector, path, lines.append, input_size_hw=(64, 96), plugin=plugin)
        images = generated_images(2, (64, 96), seed=5)
        outputs.append(onnx_export.graph_forward(path, plugin)(images))
        nodes.append(report.num_nodes)
        written = json.loads((tmp_path / f"{name}.parity.json").read_text())
        assert written["simplification"] == report.simplification
    assert nodes[0] < 0.9 * nodes[1]
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    failed = "not simplified, onnxslim failed: an operator is unknown"
    assert report.simplification == failed and any(failed in line for line in lines)


def fail(model, **options):
    """onnxslim on a graph that it cannot simplify, which it leaves half changed."""
    del model.graph.node[:]
    raise RuntimeError("an operator is unknown")


def test_many_queries_are_sampled_in_parts(tmp_path, monkeypatch):
    # 126 feature points of 4 sampling points each, at most 200 of these at once: 3 parts.
    monkeypatch.setattr(graph_attention, "POINTS_AT_ONCE", 200)
    report = export_onnx(tiny_detector(tmp_path, 2), tmp_path / "m.onnx", input_size_hw=(64, 96))
    assert report.max_abs_diff_boxes < 1e-5 and report.max_abs_diff_logits < 1e-4
    operators = [node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node]
    assert operators.count("GridSample") == 2 * 2 * 3 + 3 * 2
    assert graph_attention.even_parts(7, 3) == [3, 2, 2] and sum(graph_attention.even_parts(126, 4)) == 126


class StraightForward(torch.nn.Module):
    """mmdet's own detector with the weights of ours, as a straightforward export traces it."""

    def __init__(self, config, weights):
        super().__init__()
        ours = (
            "zero_padded_values",
            "activation_checkpoint",
            "frozen_modules",
            "background_column",
            "aux_loss",
        )
        config, head = (
            {key: value for key, value in part.items() if key not in ours}
            for part in (config, config["bbox_head"])
        )
        head["type"] = "DeformableDETRHead"
        self.detector = MODELS.build(config | dict(type="DeformableDETR", bbox_head=head)).eval()
        self.detector.load_state_dict(weights)

    def forward(self, inputs):
        meta = dict(img_shape=(64, 96), batch_input_shape=(64, 96))
        samples = [DetDataSample(metainfo=meta) for _ in range(inputs.shape[0])]
        logits, boxes = self.detector(inputs, samples, mode="tensor")
        return logits[-1], boxes[-1]


def test_the_graph_has_less_than_a_third_of_the_nodes_of_a_straightforward_one(tmp_path):
    detector = tiny_detector(tmp_path)
    export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(64, 96))
    with torch.no_grad():
        torch.onnx.export(
            StraightForward(tiny_config(tmp_path), detector.state_dict()),
            (torch.zeros(2, 3, 64, 96),),
            str(tmp_path / "plain.onnx"),
            input_names=["inputs"],
            output_names=list(OUTPUT_NAMES),
            opset_version=17,
            dynamic_axes={name: {0: "batch"} for name in ("inputs", *OUTPUT_NAMES)},
            dynamo=False,
        )
    ours, plain = (len(onnx.load(str(tmp_path / f"{name}.onnx")).graph.node) for name in ("m", "plain"))
    assert ours < plain / 3


def test_a_fixed_batch_needs_no_shape_at_all(tmp_path):
    export_onnx(tiny_detector(tmp_path, 2), tmp_path / "m.onnx", input_size_hw=(64, 64), batch_size=2)
    assert not [node for node in onnx.load(str(tmp_path / "m.onnx")).graph.node if node.op_type == "Shape"]


def test_the_file_says_what_it_is(tmp_path):
    meta = dict(class_names=["background", "cat"], input_mean=[0.5, 0.5, 0.5])
    export_onnx(tiny_detector(tmp_path, 2), tmp_path / "m.onnx", input_size_hw=(64, 96), meta=meta)
    signature = read_signature(tmp_path / "m.onnx")
    assert signature.input_size_hw == (64, 96) and signature.batch_size is None
    assert (signature.num_queries, signature.num_classes) == (15, 6)
    assert signature.class_names == ("background", "cat")


def test_a_size_the_backbone_cannot_use(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match=r"export\.input_height.*cannot be used by the backbone.*\(1, 1\)"):
        detector = tiny_detector(tmp_path, 2)
        detector.backbone.conv1.padding = (0, 0)
        export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(1, 1))
    assert not list(tmp_path.glob("*.onnx"))


def test_a_fixed_batch_has_no_dynamic_axis(tmp_path):
    detector = tiny_detector(tmp_path, 2)
    report = export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(64, 64), batch_size=3)
    assert [batch.batch_size for batch in report.batches] == [3]
    shape = onnx.load(str(tmp_path / "m.onnx")).graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [3, 3, 64, 64]


def test_a_graph_that_disagrees_is_not_left_there(tmp_path):
    detector = tiny_detector(tmp_path, 2)
    with pytest.raises(ExportError, match="does not compute what PyTorch computes"):
        export_onnx(detector, tmp_path / "m.onnx", input_size_hw=(64, 64), tolerance_boxes=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["spec.yaml"]


def test_two_stage_is_refused(tmp_path):
    with pytest.raises(ExportError, match="two-stage"):
        export_onnx(tiny_detector(tmp_path, two_stage=True), tmp_path / "m.onnx", input_size_hw=(64, 64))


def test_opsets():
    assert [usable_opset(opset) for opset in (11, 12, 15, 16, 17, 20)] == [17, 17, 17, 16, 17, 20]
    for opset in (21, 0, -3):
        with pytest.raises(ExportError, match="16 to 20"):
            usable_opset(opset)
    assert [usable_opset(opset, plugin=True) for opset in (11, 12, 17)] == [11, 12, 17]
    with pytest.raises(ExportError, match="11 to 20"):
        usable_opset(10, plugin=True)


@pytest.mark.parametrize(
    ("opset", "plugin", "warned"), [(19, False, False), (20, False, True), (20, True, False)]
)
def test_graphs_that_tensorrt_reads_wrongly_are_marked(tmp_path, opset, plugin, warned):
    lines = []
    detector = with_random_weights(tiny_config(tmp_path, "[2]", overrides=SMALLEST))
    options = dict(input_size_hw=(64, 64), opset=opset, plugin=plugin, batch_size=1)
    export_onnx(detector, tmp_path / "m.onnx", lines.append, **options)
    assert any("issue 4646" in line and "opset_version 17 to 19" in line for line in lines) is warned
    if warned:
        with pytest.raises(
            ExportError, match=r"gen_trt_engine\.onnx_file: cannot become an engine: in opset 20"
        ):
            require_sampling_for_tensorrt(tmp_path / "m.onnx", where="gen_trt_engine.onnx_file")
    else:
        require_sampling_for_tensorrt(tmp_path / "m.onnx", where="gen_trt_engine.onnx_file")


def test_differences_are_found():
    logits, boxes = np.zeros((2, 5, 3)), np.zeros((2, 5, 4))
    logits[0, 0, 0] = 1.0
    moved = boxes.copy()
    moved[1, 2, 3] = 0.25
    assert compare_outputs((logits, boxes), (logits, moved)) == BatchParity(2, 0.0, 0.25, 1.0)
    other = logits.copy()
    other[0, 0, 0], other[0, 1, 0] = 0.0, 1.0
    compared = compare_outputs((logits, boxes), (other, boxes), top=1)
    assert compared.max_abs_diff_logits == 1.0 and compared.top_agreement < 1.0
    with pytest.raises(ExportError, match="wrong shape"):
        compare_outputs((logits, boxes), (logits[:, :4], boxes))


def test_a_difference_that_is_no_number_fails():
    report = ParityReport("x.onnx", "onnxruntime", 17, 1, (2, 2), 1e-3, 1e-4, "generated")
    report.batches.append(BatchParity(1, float("nan"), 0.0, 1.0))
    assert not report.passed


def test_generated_images_are_reproducible_and_varied():
    images = generated_images(2, (70, 50))
    assert images.shape == (2, 3, 70, 50) and images.dtype == np.float32
    assert (images == generated_images(2, (70, 50))).all() and images.std() > 0.5
