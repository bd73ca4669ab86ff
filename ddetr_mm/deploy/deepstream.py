"""Write DeepStream's files: ``labels.txt`` and ``nvdsinfer_config.yaml``.

``python -m ddetr_mm.deploy.deepstream nvdsinfer_config.yaml image.jpg`` runs ``tools/deepstream_replay.py``,
which shows what DeepStream's parser makes of an image.
"""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

from ddetr_mm.deploy.onnx_file import Normalisation
from ddetr_mm.files import write_text_whole

LABELS_NAME = "labels.txt"
CONFIG_NAME = "nvdsinfer_config.yaml"
PARSER_LIBRARY = "/opt/nvidia/deepstream/deepstream/lib/libnvds_infercustomparser_tao.so"


def labels_text(class_names: Sequence[str]) -> str:
    """Return the content of ``labels.txt``: line n (from 0) names category n."""
    return "".join(f"{name.strip() or 'unknown'}\n" for name in class_names)


WORKSPACE_MIB = 1024


def config_text(
    onnx_name: str, input_size_hw: tuple[int, int], num_classes: int, normalisation: Normalisation
) -> str:
    """Return the content of ``nvdsinfer_config.yaml``, a comment above each value.

    Args:
        onnx_name: file name of the graph, in the same folder.
        input_size_hw: its input.
        num_classes: class columns of ``pred_logits``.
        normalisation: that of training.
    """
    height, width = input_size_hw
    mean_std = sum(normalisation.std_rgb) / 3
    spread = max(abs(std / mean_std - 1) for std in normalisation.std_rgb)
    stds = ", ".join(f"{std / 255:g}" for std in normalisation.std_rgb)
    offsets = ";".join(f"{value:g}" for value in normalisation.mean_rgb)
    return f"""\
# For DeepStream's nvinfer (config-file-path). Paths are relative to this file.
class-attrs-all:
  # Scores (sigmoid, 0..1) below this are dropped by the parser.
  pre-cluster-threshold: 0.5
  # Most boxes of one class in a frame.
  topk: 20
property:
  # 4: no clustering. The detector gives one box per object, there is nothing to suppress.
  cluster-mode: 4
  # The parser of NVIDIA's deepstream_tao_apps; build or install it there.
  custom-lib-path: {PARSER_LIBRARY}
  # Id of this element in the pipeline's metadata.
  gie-unique-id: 1
  # Channels, height, width of the graph's input.
  infer-dims: 3;{height};{width}
  # Line n (from 0) names category n.
  labelfile-path: {LABELS_NAME}
  # 1: the frame keeps its aspect ratio and is padded with black at the right and the bottom. 0 stretches it,
  # as `ddetr-mm evaluate` does with this graph.
  maintain-aspect-ratio: 1
  # 0: RGB.
  model-color-format: 0
  # 1 / (255 * mean of the standard deviations). nvinfer has one factor for all colours; the spec's are
  # {stds}, so a colour is off by {spread:.1%} of its contrast at most.
  net-scale-factor: {1 / mean_std:.12g}
  # 2: FP16. 0 is FP32, 1 is INT8.
  network-mode: 2
  # 0: a detector.
  network-type: 0
  # Class columns of the graph, background included; the parser refuses any other number.
  num-detected-classes: {num_classes}
  # The spec's mean colour, red;green;blue, in 0..255.
  offsets: {offsets}
  # The graph; the engine that nvinfer builds from it is kept beside it.
  onnx-file: {onnx_name}
  # The parser finds its two inputs by these names.
  output-blob-names: pred_logits;pred_boxes
  # 1: raw outputs are attached to the frames too.
  output-tensor-meta: 1
  # The function of custom-lib-path that parses this detector's outputs.
  parse-bbox-func-name: NvDsInferParseCustomDDETRTAO
  # Memory for building the engine, in MiB (TAO writes 1048576, which would be 1 TiB).
  workspace-size: {WORKSPACE_MIB}
"""


def write_deepstream_files(
    onnx_file: str | Path,
    input_size_hw: tuple[int, int],
    class_names: Sequence[str],
    normalisation: Normalisation,
) -> tuple[Path, Path]:
    """Write ``labels.txt`` and ``nvdsinfer_config.yaml`` beside the graph.

    Args:
        onnx_file: the exported graph.
        input_size_hw: its input.
        class_names: one for each class column.
        normalisation: that of training.

    Returns:
        The two paths.
    """
    folder = Path(onnx_file).parent
    config = config_text(Path(onnx_file).name, input_size_hw, len(class_names), normalisation)
    return (
        write_text_whole(folder / LABELS_NAME, labels_text(class_names)),
        write_text_whole(folder / CONFIG_NAME, config),
    )


if __name__ == "__main__":
    # An installed package has its tools below .mim.
    folders = (Path(__file__).parents[1] / ".mim", Path(__file__).parents[2])
    tool = next(path for folder in folders if (path := folder / "tools" / "deepstream_replay.py").is_file())
    runpy.run_path(str(tool), run_name="__main__")
