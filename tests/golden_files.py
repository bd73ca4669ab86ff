"""Where the tests find the stored outputs of other implementations and the real pictures.

Both lie in this folder, so that a clone has them: see ``golden/README.md`` and ``assets/bccd/README.md``.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent
GOLDEN = TESTS / "golden"
BCCD = TESTS / "assets" / "bccd"


def seeded_weights() -> ModuleType:
    """``golden/seeded_weights.py`` as a module: ``seeded(name, shape)`` makes one parameter's values."""
    module_spec = importlib.util.spec_from_file_location("seeded_weights", GOLDEN / "seeded_weights.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def golden_state_dict(name: str) -> dict[str, Tensor]:
    """Seeded weights of a golden model under its own keys; an alias is the tensor that it repeats."""
    seeded = seeded_weights().seeded
    description = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    aliases = description["aliases"]
    tensors = {
        key: torch.from_numpy(np.ascontiguousarray(seeded(key, shape)))
        for key, shape in description["state_dict"].items()
        if key not in aliases
    }
    return {key: tensors[aliases.get(key, key)] for key in description["state_dict"]}
