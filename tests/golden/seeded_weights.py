"""Deterministic weights for a list of (name, shape): what a parity test fills a model with."""

import math
import zlib

import numpy as np


def seeded(name, shape):
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    n = rng.standard_normal(tuple(shape) or (1,)).astype(np.float32).reshape(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(n)
    if leaf == "running_mean":
        return 0.1 * n
    if leaf in ("gamma1", "gamma2"):
        return 0.5 + 0.1 * n
    if leaf == "relative_position_bias_table":
        return 0.5 * n
    if len(shape) >= 2:
        fan_in = int(np.prod(shape[1:]))
        return n / math.sqrt(fan_in)
    if leaf == "weight":
        return 1 + 0.1 * n
    if "sampling_offsets" in name:
        return 2.0 * n
    return 0.1 * n
