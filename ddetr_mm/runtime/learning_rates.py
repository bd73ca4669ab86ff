"""The learning rates of a run's groups of parameters, under names that a reader knows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def learning_rates(runner: Any) -> dict[str, float]:
    """The present rate of every group, the largest base rate first.

    Parameters of one rate make one group. It is named after the rate it began with and, where the config
    tells groups apart by parts of parameter names (``paramwise_cfg.custom_keys``), after those parts.

    Args:
        runner: with ``optim_wrapper``, ``model`` and ``cfg``.
    """
    config = (runner.cfg or {}).get("optim_wrapper") or {}
    keys = list((config.get("paramwise_cfg") or {}).get("custom_keys") or {})
    names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    now: dict[float, float] = {}
    parts: dict[float, list[str]] = {}
    for group in runner.optim_wrapper.param_groups:
        base = float(group.get("initial_lr", group["lr"]))
        now[base] = float(group["lr"])
        for parameter in group["params"] if keys else ():
            part = matching_key(names.get(id(parameter), ""), keys)
            if part not in parts.setdefault(base, []):
                parts[base].append(part)
    return {_label(base, parts.get(base, [])): now[base] for base in sorted(now, reverse=True)}


def matching_key(name: str, keys: Iterable[str]) -> str:
    """The part of a parameter's name that decides its rate, as mmengine chooses it; ``"rest"`` for none."""
    ordered = sorted(sorted(keys), key=len, reverse=True)
    return next((key for key in ordered if key in name), "rest")


def _label(base: float, parts: list[str]) -> str:
    return f"{', '.join(sorted(parts))} ({base:.3g})" if parts else f"{base:.3g}"
