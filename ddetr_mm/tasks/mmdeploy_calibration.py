"""Calibration images for mmdeploy's int8 engines, written as mmdeploy writes them. No TensorRT is needed.

The file is HDF5: under ``calib_data/end2end/input`` one array (1, 3, H, W) an image, named from ``0`` on.
They are what the graph gets: loaded and resized as the graph's input demands, and normalised.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ddetr_mm.errors import ExportError, Problem, StackError
from ddetr_mm.files import written_whole
from ddetr_mm.tasks.mmdet_tools import SPEC_SUFFIXES

LOADERS = ("val_dataloader", "test_dataloader")


def write_calibration_data(
    deploy_cfg: Any, model_cfg: Any, checkpoint: Path, dataset_cfg: str | None, folder: Path
) -> Path | None:
    """Write the file that ``calib_config`` of the deploy config names; nothing where it names none.

    Args:
        deploy_cfg: the deploy config, its input size filled in and its backend one that knows the CPU.
        model_cfg: the model config.
        checkpoint: the model's weights.
        dataset_cfg: a config or spec whose validation (else test) images are used; None for those of the
            model config.
        folder: where the file goes.

    Returns:
        The file, or None.

    Raises:
        ExportError: when images are named and the deploy config does no calibration, or the other way round.
        StackError: without h5py.
    """
    from mmdeploy.apis import create_calib_input_data
    from mmdeploy.utils import get_calib_filename

    name = get_calib_filename(deploy_cfg)
    if name is None:
        if dataset_cfg is None:
            return None
        raise ExportError(
            Problem(
                "has no effect: the deploy config does no calibration",
                where="--calib-dataset-cfg",
                value=dataset_cfg,
                mend="leave it out, or use configs/deploy/tensorrt_int8.py",
            )
        )
    if importlib.util.find_spec("h5py") is None:
        raise StackError(Problem("mmdeploy keeps calibration images in HDF5", mend="pip install h5py"))
    images = images_config(model_cfg, dataset_cfg, checkpoint, deploy_cfg.onnx_config.input_shape)
    with written_whole(folder / name) as temporary:
        create_calib_input_data(
            str(temporary),
            deploy_cfg,
            model_cfg,
            str(checkpoint),
            dataset_cfg=images,
            dataset_type="val",
            device="cpu",
        )
    return folder / name


def images_config(
    model_cfg: Any, dataset_cfg: str | None, checkpoint: Path, input_shape: tuple[int, int]
) -> Any:
    """A config whose ``val_dataloader`` gives the calibration images at the graph's size.

    Args:
        model_cfg: the model config; its test pipeline is the one that is used.
        dataset_cfg: see :func:`write_calibration_data`.
        checkpoint: the weights that a spec is translated for.
        input_shape: width and height of the graph's input.

    Raises:
        ExportError: when no data loader is there.
    """
    from mmengine.config import Config

    if dataset_cfg is None:
        named, source = "model_cfg", model_cfg
    elif Path(dataset_cfg).suffix.lower() in SPEC_SUFFIXES:
        named, source = dataset_cfg, Config.fromstring(spec_source(dataset_cfg, checkpoint), ".py")
    else:
        named, source = dataset_cfg, Config.fromfile(dataset_cfg)
    loader = next((source[key] for key in LOADERS if source.get(key)), None)
    if loader is None:
        raise ExportError(
            Problem(
                "names no images for the calibration",
                file=named,
                allowed=" or ".join(LOADERS),
                mend="give --calib-dataset-cfg",
            )
        )
    steps = [step.to_dict() for step in model_cfg.test_pipeline]
    for step in steps:
        if step["type"] == "Resize":
            step.update(scale=tuple(input_shape), keep_ratio=False)
    loader.dataset.pipeline = steps
    loader.num_workers, loader.persistent_workers = 0, False
    return Config(dict(val_dataloader=loader.to_dict()))


def spec_source(spec: str, checkpoint: Path) -> str:
    """A spec's evaluation as config text."""
    from ddetr_mm.spec import load_spec
    from ddetr_mm.tasks.runner import config_source

    loaded = load_spec(spec, [f"evaluate.checkpoint={checkpoint}"], "evaluate")
    return config_source(loaded, "evaluate", str(checkpoint))
