"""Partitions and shards: which image goes where, what the files are called, and writing one.

Planning depends on nothing but its arguments, so that the same input gives the same files on every machine.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddetr_mm.convert.sequences import KittiSequence

# --- Planning ---

PARTITION_MODES = ("random", "sequence")
_IMAGES_PER_PIECE = 256


@dataclass(frozen=True)
class Piece:
    """Some images of one shard: what one process reads at a time.

    Attributes:
        sequence: the folders that the images and labels are in.
        partition, shard: the shard that the images go to.
        names: file names of the images.
        is_repeat: whether these images fill the shard, and are in another one already.
        ends_shard: whether this is the shard's last piece.
    """

    sequence: KittiSequence
    partition: int
    shard: int
    names: list[str]
    is_repeat: bool = False
    ends_shard: bool = False


def partition_pieces(
    sequence: KittiSequence,
    names: Sequence[str],
    partition: int,
    *,
    num_shards: int,
    val_percent: float | None,
    pad_shards: bool,
    seed: int,
) -> Iterator[Piece]:
    """The pieces of one sequence's part of a partition, shard after shard; an empty shard is a piece too.

    Args:
        sequence: where the images are.
        names: all images of the sequence.
        partition: from 0.
        num_shards: files that the partition is cut into.
        val_percent: share of the images that partition 0 takes at random, the others going to partition 1;
            None: all go to this one.
        pad_shards: fill shorter shards with repeated images.
        seed: fixes the random choices.
    """
    if val_percent is not None:
        is_validation = validation_mask(len(names), val_percent, f"{seed}/{sequence.name}")
        wanted = is_validation if partition == 0 else ~is_validation
        names = list(itertools.compress(names, wanted.tolist()))
    longest = math.ceil(len(names) / num_shards)
    for shard, positions in enumerate(split_evenly(len(names), num_shards)):
        num_repeats = longest - len(positions) if pad_shards else 0
        for start in positions[::_IMAGES_PER_PIECE] or [positions.start]:
            stop = min(start + _IMAGES_PER_PIECE, positions.stop)
            ends = stop == positions.stop and not num_repeats
            yield Piece(sequence, partition, shard, list(names[start:stop]), ends_shard=ends)
        if num_repeats:
            choice = random.Random(f"{seed}/{sequence.name}/{partition}/{shard}")  # noqa: S311
            repeats = choice.choices(names, k=num_repeats)
            yield Piece(sequence, partition, shard, repeats, is_repeat=True, ends_shard=True)


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Join consecutive pieces of one sequence up to the size of a large one, to be read together."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and (piece.sequence is not group[0].sequence or size + len(piece.names) > _IMAGES_PER_PIECE):
            yield group
            group, size = [], 0
        group.append(piece)
        size += len(piece.names)
    if group:
        yield group


def split_evenly(num_items: int, num_parts: int) -> list[range]:
    """Cut ``range(num_items)`` into ``num_parts`` ranges whose lengths differ by at most one.

    >>> split_evenly(5, 3)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    length, longer = divmod(num_items, num_parts)
    starts = [part * length + min(part, longer) for part in range(num_parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def validation_mask(num_items: int, val_percent: float, seed: str) -> NDArray[np.bool_]:
    """Choose ``floor(num_items * val_percent / 100)`` items at random.

    Args:
        num_items: how many there are.
        val_percent: share to choose, 0 to 100.
        seed: text that fixes the choice.

    Returns:
        ``(num_items,)``: True where chosen.
    """
    mask = np.zeros(num_items, dtype=bool)
    choice = random.Random(seed)  # noqa: S311
    mask[choice.sample(range(num_items), int(num_items * val_percent / 100))] = True
    return mask


def assign_sequences(num_images: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Give whole sequences to partitions so that each comes near its share of the images.

    Largest first, each goes to the partition that misses most of its share; every partition gets one.

    Args:
        num_images: images per sequence; at least as many sequences as partitions.
        shares: wanted size of each partition, in any unit, not negative.

    Returns:
        The partition of each sequence.
    """
    total, whole = sum(num_images), sum(shares)
    missing = [total * share / whole for share in shares]
    partitions = [-1] * len(num_images)
    num_empty = len(shares)
    by_size = sorted(range(len(num_images)), key=lambda index: (-num_images[index], index))
    for rank, index in enumerate(by_size):
        candidates: Sequence[int] = range(len(shares))
        if len(by_size) - rank == num_empty:  # the rest is just enough for the empty ones
            candidates = [partition for partition in candidates if partition not in partitions]
        chosen = max(candidates, key=lambda partition: (missing[partition], -partition))
        num_empty -= chosen not in partitions
        partitions[index] = chosen
        missing[chosen] -= num_images[index]
    return partitions


def shard_file(sequence: str, partition: int, num_partitions: int, shard: int, num_shards: int) -> str:
    """Path of a shard inside the results folder.

    >>> shard_file("cam0", 0, 1, 3, 32), shard_file("a/cam0", 1, 2, 0, 4)
    ('cam0/cam0-shard-00003-of-00032.json', 'a/cam0/cam0-fold-001-of-002-shard-00000-of-00004.json')
    """
    name = sequence.rpartition("/")[2]
    fold = f"-fold-{partition:03d}-of-{num_partitions:03d}" if num_partitions > 1 else ""
    return f"{sequence}/{name}{fold}-shard-{shard:05d}-of-{num_shards:05d}.json"


# --- Writing ---

_SPOOL_BYTES = 16 * 2**20
_encoder = msgspec.json.Encoder()


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int


class ShardWriter:
    """Writes one COCO JSON file piece by piece; memory does not grow with its size.

    Args:
        path: the file, in a folder that exists.
        description: ``info.description`` of the file.
        categories: the ``categories`` list.
        first_image_id: id of the first image; the following ones count on.
        first_annotation_id: the same for annotations.

    Attributes:
        num_images: images written so far.
        num_annotations: annotations written so far.
    """

    def __init__(
        self,
        path: Path,
        description: str,
        categories: Sequence[dict[str, Any]],
        first_image_id: int,
        first_annotation_id: int,
    ) -> None:
        self.num_images = self.num_annotations = 0
        self._first_image_id = first_image_id
        self._first_annotation_id = first_annotation_id
        # In the file the annotations follow the images; the conversion gives both at once.
        self._annotations: IO[bytes] = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            _SPOOL_BYTES, dir=str(path.parent)
        )
        self._file = path.open("wb")
        head = {"info": {"description": description}, "licenses": [], "categories": list(categories)}
        self._file.write(_encoder.encode(head)[:-1] + b',"images":[')

    def add(
        self,
        file_names: Sequence[str],
        sizes_wh: NDArray[np.int32],
        boxes_xywh: NDArray[np.float64],
        category_ids: NDArray[np.int32],
        image_index: NDArray[np.int32],
    ) -> None:
        """Append images and their boxes.

        Args:
            file_names: ``n`` names as in the file.
            sizes_wh: ``(n, 2)`` pixels.
            boxes_xywh: ``(m, 4)`` pixels.
            category_ids: ``(m,)``.
            image_index: ``(m,)``: which of the ``n`` images each box belongs to.
        """
        first_image = self._first_image_id + self.num_images
        images = [
            _Image(number, name, width, height)
            for number, (name, (width, height)) in enumerate(
                zip(file_names, sizes_wh.tolist(), strict=True), start=first_image
            )
        ]
        annotations = [
            _Annotation(number, image_id, category_id, box, area, 0)
            for number, (image_id, category_id, box, area) in enumerate(
                zip(
                    (image_index + first_image).tolist(),
                    category_ids.tolist(),
                    boxes_xywh.tolist(),
                    (boxes_xywh[:, 2] * boxes_xywh[:, 3]).tolist(),
                    strict=True,
                ),
                start=self._first_annotation_id + self.num_annotations,
            )
        ]
        _append(self._file, images, self.num_images > 0)
        _append(self._annotations, annotations, self.num_annotations > 0)
        self.num_images += len(images)
        self.num_annotations += len(annotations)

    def close(self) -> None:
        """Finish the file."""
        self._file.write(b'],"annotations":[')
        self._annotations.seek(0)
        shutil.copyfileobj(self._annotations, self._file, 2**20)
        self._file.write(b"]}")
        self.discard()

    def discard(self) -> None:
        """Close the file without finishing it; harmless after :meth:`close`."""
        self._annotations.close()
        self._file.close()


def _append(file: IO[bytes], rows: Sequence[msgspec.Struct], follows: bool) -> None:
    if rows:
        file.write((b"," if follows else b"") + _encoder.encode(rows)[1:-1])
