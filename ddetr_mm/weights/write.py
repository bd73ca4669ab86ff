"""Writing a checkpoint's weights in one of the four formats."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import ddetr_mm
from ddetr_mm.errors import Problem, WeightsError
from ddetr_mm.files import write_text_whole, written_whole
from ddetr_mm.weights.checkpoint import META_KEY, CheckpointMeta

_SECRET_KEYS = frozenset({"encryption_key", "api_key"})


def write_checkpoint(
    path: Path,
    format_name: str,
    tensors: Mapping[str, Tensor],
    meta: CheckpointMeta,
    hf_config: Mapping[str, Any] | None = None,
) -> None:
    """Write weights under the format's own names, beside and renamed.

    Args:
        path: a file; for ``hf`` a folder. A name ending in ``.safetensors`` gives a safetensors file of any
            format, with the metadata as text inside.
        format_name: ``mmdet``, ``tao``, ``official`` or ``hf``.
        tensors: the format's key → tensor.
        meta: carried inside the file.
        hf_config: content of ``config.json``, needed for ``hf``.

    Raises:
        WeightsError: when the destination cannot be written.
    """
    plain = {**meta.to_dict(), "package_version": ddetr_mm.__version__}
    try:
        if path.suffix == ".safetensors":
            with written_whole(path) as temporary:
                metadata = {"format": "pt", META_KEY: json.dumps(plain)}
                save_file(_separate(tensors), temporary, metadata=metadata)
        elif format_name == "hf":
            _write_hf_folder(path, tensors, {**(hf_config or {}), META_KEY: plain})
        else:
            if path.is_dir():
                raise WeightsError(Problem("is a folder", file=path, mend="give the name of a file"))
            with written_whole(path) as temporary:
                torch.save(_container(format_name, tensors, meta, plain), temporary)
    except (OSError, RuntimeError) as error:
        # torch's own writer reports a full disk as a RuntimeError.
        mend = "check that the disk has room and that you may write there"
        raise WeightsError(Problem(f"cannot be written: {error}", file=path, mend=mend)) from error


def _container(
    format_name: str, tensors: Mapping[str, Tensor], meta: CheckpointMeta, plain: dict[str, Any]
) -> dict[str, Any]:
    """The dictionary that a PyTorch file of the format holds: plain data and tensors only."""
    state_dict = OrderedDict((key, value.detach()) for key, value in tensors.items())
    epoch = meta.epoch or 0
    if format_name == "tao":
        return {
            "state_dict": state_dict,
            "epoch": epoch,
            "global_step": 0,
            "pytorch-lightning_version": "2.0.0",
            META_KEY: plain,
        }
    if format_name == "official":
        return {"model": state_dict, "epoch": epoch, META_KEY: plain}
    about: dict[str, Any] = {"epoch": epoch, "iter": 0, META_KEY: plain}
    if meta.class_names:
        about["dataset_meta"] = {"classes": tuple(meta.class_names)}
        if meta.category_ids:
            about["dataset_meta"]["category_ids"] = list(meta.category_ids)
    return {"meta": about, "state_dict": state_dict}


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors demands."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, value in tensors.items():
        tensor = value.detach().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        separate[key] = tensor
    return separate


def _write_hf_folder(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    if folder.exists() and not folder.is_dir():
        raise WeightsError(Problem("is a file, but this format is a folder", file=folder))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if folder.exists():
        # Other files of the folder (an image processor's settings …) stay.
        with written_whole(folder / "model.safetensors") as temporary:
            save_file(_separate(tensors), temporary, metadata={"format": "pt"})
        write_text_whole(folder / "config.json", text)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".tmp-{os.getpid()}-{folder.name}")
    try:
        temporary.mkdir()
        save_file(_separate(tensors), temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "config.json").write_text(text, encoding="utf-8")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def spec_as_plain(spec: Any) -> dict[str, Any] | None:
    """An experiment spec as plain data for a file's metadata, without its secrets.

    Args:
        spec: a dataclass, a mapping, or None.
    """
    if spec is None:
        return None
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        spec = dataclasses.asdict(spec)
    plain = _plain(spec)
    return plain if isinstance(plain, dict) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if str(key) not in _SECRET_KEYS}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
