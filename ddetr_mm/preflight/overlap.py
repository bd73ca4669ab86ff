"""Images that stand in two splits, by content: a validation on them says nothing."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path

from ddetr_mm.preflight.findings import Section, fault, note
from ddetr_mm.preflight.split import Split

MOST_HASHED = 4000
"""Files of equal size that are read at most, where not all are asked for."""


def check_overlap(splits: Sequence[Split], *, full: bool = False) -> Section:
    """Compare the images of every two splits.

    Only files of equal size can be equal, so sizes are compared first and few files are read.
    """
    section = Section("images in two splits")
    sizes = {split.name: files_by_size(split) for split in splits}
    for first, second in combinations(splits, 2):
        shared_sizes = set(sizes[first.name]) & set(sizes[second.name])
        one = [path for size in sorted(shared_sizes) for path in sizes[first.name][size]]
        other = [path for size in sorted(shared_sizes) for path in sizes[second.name][size]]
        complete = full or len(one) + len(other) <= MOST_HASHED
        if not complete:
            one, other = one[: MOST_HASHED // 2], other[: MOST_HASHED // 2]
        digests = digests_of(one)
        equal = [(digests[digest], path) for path in other if (digest := digest_of(path)) in digests]
        section.lines.append(
            f"{first.name} and {second.name}: {len(equal)} equal images"
            + ("" if complete else f" among {len(one) + len(other):,} files read (--full reads all)")
        )
        section.data[f"{first.name}-{second.name}"] = len(equal)
        if not equal:
            continue
        share = len(equal) / max(second.table.num_images, 1)
        # One frame too many is a slip; a large share means that the validation measures memory.
        build = fault if share > 0.5 and first.name == "train" else note
        section.findings.append(
            build(
                "splits-overlap",
                f"{len(equal)} images of {second.name} ({share:.0%}) are in {first.name} too, the first: "
                f"{equal[0][1]} is {equal[0][0]}",
                where=f"{first.where} and {second.where}",
                mend="`ddetr-mm coco split` divides one file into parts without common images",
            )
        )
    return section


def files_by_size(split: Split) -> dict[int, list[Path]]:
    """Size in bytes → the image files of that size; missing files are left out."""
    found: dict[int, list[Path]] = defaultdict(list)
    for row in range(split.table.num_images):
        path = split.path(row)
        try:
            found[path.stat().st_size].append(path)
        except OSError:
            continue  # told by the check of the images
    return found


def digests_of(paths: Iterable[Path]) -> dict[bytes, Path]:
    """Digest of the content → the file."""
    return {digest_of(path): path for path in paths}


def digest_of(path: Path) -> bytes:
    """Digest of a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.digest()
