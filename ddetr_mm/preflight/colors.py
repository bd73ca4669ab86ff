"""Colours: the mean and standard deviation of the spec against the images, and the order of channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ddetr_mm.preflight.findings import Finding, Section, fault, suspicion
from ddetr_mm.preflight.thumbnails import Thumbnail

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEAST_IMAGES = 8
"""Fewer images say nothing about the colours of a data set."""


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> list[Finding]:
    """The spec's numbers by themselves.

    Args:
        mean: ``input_mean``: 1 or 3 numbers, RGB, on the scale 0..1.
        std: ``input_std``, likewise.
    """
    findings = []
    for name, values in (("input_mean", mean), ("input_std", std)):
        if max(values) > 1:
            findings.append(
                _wrong_scale(name, values, [value / 255 for value in values], "on the scale 0 to 255")
            )
    if max(std) < 0.02:
        findings.append(_wrong_scale("input_std", std, [value * 255 for value in std], "255 times too small"))
    if _near(mean, IMAGENET_MEAN[::-1]) and not _near(mean, IMAGENET_MEAN):
        findings.append(
            suspicion(
                "channels-bgr",
                "is ImageNet's mean in the order blue, green, red; the spec's order is red, green, blue",
                where="dataset.augmentation.input_mean",
                value=list(mean),
                mend=f"write {list(IMAGENET_MEAN)}, and input_std as {list(IMAGENET_STD)}",
            )
        )
    return findings


def _wrong_scale(name: str, values: Sequence[float], better: Sequence[float], how: str) -> Finding:
    return fault(
        "normalisation-scale",
        f"is {how}",
        where=f"dataset.augmentation.{name}",
        value=list(values),
        allowed="numbers on the scale 0 to 1",
        mend=f"write {[round(value, 4) for value in better]}",
    )


def _near(values: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(values) == 3 and bool(np.allclose(values, wanted, atol=0.004))


def check_colors(
    by_split: Mapping[str, Sequence[Thumbnail]], mean: Sequence[float], std: Sequence[float]
) -> Section:
    """Colours of the images: after normalisation, and compared between splits."""
    section = Section("colours")
    measured = {name: channel_means(images) for name, images in by_split.items() if images}
    for name, means in measured.items():
        overall = means.mean(axis=0)
        spread = np.mean([image.rgb.reshape(-1, 3).std(axis=0) for image in by_split[name]], axis=0)
        section.lines.append(
            f"{name}: mean RGB {_three(overall)}, standard deviation within an image {_three(spread)} "
            "(0 to 1)"
        )
        section.data[name] = dict(mean_rgb=overall.round(4).tolist(), std_rgb=spread.round(4).tolist())
        section.findings += _far_off(name, overall, spread, np.asarray(mean), np.asarray(std))
    names = list(measured)
    for number, first in enumerate(names):
        for second in names[number + 1 :]:
            section.findings += _reversed_channels(first, measured[first], second, measured[second])
    return section


def channel_means(images: Sequence[Thumbnail]) -> npt.NDArray[np.float64]:
    """(n, 3) mean red, green and blue of every image, 0..1."""
    return np.array([image.rgb.reshape(-1, 3).mean(axis=0) for image in images], dtype=np.float64)


def _far_off(
    name: str, overall: np.ndarray, spread: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> Iterator[Finding]:
    """Whether what the network sees is near zero mean and unit spread, as its weights expect."""
    offset = np.abs((overall - mean) / std).max()
    scale = spread / std
    if offset > 10 or scale.max() > 30 or (spread.max() > 0.01 and scale.max() < 1 / 30):
        yield fault(
            "normalisation-scale",
            f"the images of {name} reach the network with values around {offset:.3g} and a spread of "
            f"{scale.max():.3g}, where both should be about 1",
            where="dataset.augmentation.input_mean, input_std",
            value=[mean.tolist(), std.tolist()],
            mend=f"the images have mean {_three(overall)} on the scale 0 to 1",
        )


def _reversed_channels(first: str, one: np.ndarray, second: str, other: np.ndarray) -> Iterator[Finding]:
    """Whether one split is as red as the other is blue."""
    if min(len(one), len(other)) < LEAST_IMAGES:
        return
    (tint, error), (other_tint, other_error) = _tint(one), _tint(other)
    clear = (
        abs(tint) > 4 * error and abs(other_tint) > 4 * other_error and min(abs(tint), abs(other_tint)) > 0.01
    )
    if clear and tint * other_tint < 0 and 0.5 < abs(tint / other_tint) < 2:
        yield suspicion(
            "channels-bgr",
            f"red and blue look exchanged between {first} and {second}: red exceeds blue by {tint:+.3f} in "
            f"{first} and by {other_tint:+.3f} in {second}",
            where=f"dataset.{first}_data_sources and dataset.{second}_data_sources",
            mend="one of them was written by a program with the other order of channels (OpenCV's is BGR)",
        )


def _tint(means: np.ndarray) -> tuple[float, float]:
    """How much red exceeds blue over many images, and the standard error of that."""
    red_over_blue = means[:, 0] - means[:, 2]
    return float(red_over_blue.mean()), float(red_over_blue.std(ddof=1) / np.sqrt(len(means))) + 1e-9


def _three(values: np.ndarray) -> str:
    return " / ".join(f"{value:.3f}" for value in values)
