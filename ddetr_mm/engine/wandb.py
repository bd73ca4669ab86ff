"""Weights & Biases: mmengine's backend, made safe for a run without package, account or network.

mmengine's :class:`WandbVisBackend` stops a run where the package is missing, uploads every Python file of the
current folder, and closes the run by a call that the package no longer has.
"""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from mmdet.registry import VISBACKENDS
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.visualization.vis_backend import WandbVisBackend, force_init_env

from ddetr_mm.files import SECRETS

PACKAGE = "wandb"


@VISBACKENDS.register_module()
class WandbBackend(WandbVisBackend):
    """Scalars, pictures and the config of a run for Weights & Biases.

    A run never fails for its report: without the package, without an account (and not offline), or when the
    run cannot be opened, one log line says so. ``WANDB_MODE=offline`` keeps the run in ``save_dir`` for
    ``wandb sync``.

    Args:
        save_dir: folder for the package's own files.
        project: the project the run is filed under.
        entity: user or team that owns the project; empty: the account's own.
        group: name that groups several runs; empty: none.
        tags: words attached to the run.
        run_name: name shown for the run; mmengine takes ``name`` for the key of the backend.
        run_id: identifier of the run; one that exists is continued. Empty: a new one.
        reinit: let one process open several runs.
        sync_tensorboard: take the scalars from the TensorBoard events instead of logging them a second time.
            The backend must then be listed before ``TensorboardVisBackend``.
        save_code: upload the source code of the main script.
        announce: log the reason where nothing can be reported.
    """

    def __init__(
        self,
        save_dir: str,
        project: str = "",
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        run_name: str = "",
        run_id: str = "",
        reinit: bool = False,
        sync_tensorboard: bool = False,
        save_code: bool = False,
        announce: bool = True,
    ) -> None:
        self.announce = announce
        self.init_arguments: dict[str, Any] = dict(
            project=project or None,
            entity=entity or None,
            group=group or None,
            tags=list(tags or ()),
            name=run_name or None,
            id=run_id or None,
            resume="allow" if run_id else None,
            reinit=reinit,
            sync_tensorboard=sync_tensorboard,
            save_code=save_code,
            dir=save_dir,
        )
        # Without the metric's definition the horizontal axis would count calls, not training steps.
        super().__init__(
            save_dir,
            init_kwargs=self.init_arguments,
            define_metric_cfg=[dict(name="*", step_metric="step")],
        )
        self.sync_tensorboard = sync_tensorboard
        self._wandb: Any = None

    def _init_env(self) -> None:
        """Open the run, or log why there is none."""
        reason = why_unavailable()
        if reason is None:
            import wandb

            try:
                super()._init_env()
            except wandb.Error as error:
                reason = f"the run could not be opened: {error}"
        if reason is not None and self.announce:
            message = f"Weights & Biases: nothing is reported, because {reason}."
            print_log(message, "current", logging.INFO)

    @force_init_env
    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Record the config, without secrets and without uploading source files."""
        if self._wandb is not None:
            self._wandb.config.update(without_secrets(config.to_dict()), allow_val_change=True)

    @force_init_env
    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        """Record an RGB picture (H, W, 3), uint8."""
        if self._wandb is not None:
            self._wandb.log({name: self._wandb.Image(image), "step": step})

    @force_init_env
    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        """Record one number."""
        self.add_scalars({name: value}, step)

    @force_init_env
    def add_scalars(
        self, scalar_dict: Mapping[str, Any], step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        """Record numbers of one step."""
        if self._wandb is not None and not self.sync_tensorboard:
            self._wandb.log({**scalar_dict, "step": step})

    def close(self) -> None:
        """End the run."""
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None


def why_unavailable() -> str | None:
    """The reason why no run can be opened here; None if one can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "the package wandb is not installed"
    import wandb

    settings = wandb.setup().settings
    if settings.mode == "online" and not settings.api_key and not has_login(settings.base_url):
        return "no account is set up (`wandb login`, or WANDB_API_KEY; WANDB_MODE=offline works without)"
    return None


def has_login(base_url: str) -> bool:
    """Whether the user's netrc file has a key for a server, as ``wandb login`` writes it."""
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlsplit(base_url).hostname or "") is not None


def without_secrets(value: Any) -> Any:
    """A copy of plain nested data in which the values of secret keys are hidden."""
    if isinstance(value, Mapping):
        return {
            key: "(hidden)" if key in SECRETS and item else without_secrets(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(item) for item in value]
    return value
