"""Folders of images without annotations, as a dataset for inference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets.base_det_dataset import BaseDetDataset
from mmdet.registry import DATASETS

from ddetr_mm.data.image_check import unreadable_told
from ddetr_mm.data.sources import join_location, list_images


@DATASETS.register_module()
class ImageFolderDataset(BaseDetDataset):
    """All images of some folders, in the folders' order, sorted by name within each.

    Takes any test pipeline; one with ``LoadAnnotations`` gets empty annotations.

    Args:
        folders: a folder, or several, relative to ``data_root``; single image files count too.
        recursive: search subfolders too.
        metainfo, data_root, indices, pipeline, lazy_init: as in mmengine's ``BaseDataset``.

    Each data info: ``img_path``, ``img_id`` (the position in the whole list), ``source_id`` (position of
    the folder), ``instances`` (empty), ``sample_idx``.

    Raises:
        DataError: a folder does not exist, or there is no image.
    """

    def __init__(
        self, folders: str | os.PathLike[str] | Sequence[str], *, recursive: bool = False, **kwargs: Any
    ) -> None:
        self.folders = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
        self.recursive = recursive
        kwargs.setdefault("data_prefix", {})
        kwargs.setdefault("test_mode", True)
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """The samples; called once by mmengine."""
        root = self.data_root or ""
        folders = [Path(join_location(root, os.fspath(folder))) for folder in self.folders]
        samples = []
        for image_id, path in enumerate(list_images(folders, recursive=self.recursive)):
            source = next(index for index, folder in enumerate(folders) if path.is_relative_to(folder))
            samples.append({"img_path": str(path), "img_id": image_id, "source_id": source, "instances": []})
        return samples

    def prepare_data(self, idx: int) -> Any:
        """Run the pipeline on sample ``idx``.

        Raises:
            DataError: the image file cannot be read.
        """
        info = self.get_data_info(idx)
        with unreadable_told(info["img_path"], self.backend_args):
            return self.pipeline(info)
