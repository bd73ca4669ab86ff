"""The Runner of a translated spec: a quiet console, a config text made in no time, workers ended in time."""

from __future__ import annotations

import keyword
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

from ddetr_mm.compat.config_text import format_value
from ddetr_mm.engine.train_loop import end_data_workers

DATA_TIMEOUT_S = 300
"""Seconds after which a batch that does not come ends the run, where the config does not say ``timeout``."""

# mmengine formats the config with yapf each time that its text is wanted, half a second each: four times when
# a Runner starts, and once with every checkpoint.


class QuickTextConfig(Config):
    """A ``Config`` whose text is written by :func:`.compat.config_text.format_value`, in milliseconds."""

    @property
    def pretty_text(self) -> str:
        """The config as Python code; by mmengine where it holds more than plain data, as lazy configs do."""
        try:
            sections = self._cfg_dict.to_dict().items()
            if not all(name.isidentifier() and not keyword.iskeyword(name) for name, _ in sections):
                return str(super().pretty_text)
            lines = [f"{name} = {format_value(value, prefix=len(name) + 3)}" for name, value in sections]
        except (TypeError, ValueError):
            return str(super().pretty_text)
        return "\n".join([*lines, ""])

    @classmethod
    def of(cls, config: Config) -> QuickTextConfig:
        """A copy of a config, as one of these."""
        made = cls.__new__(cls)
        made.__setstate__(config.copy().__getstate__())
        return made


# --- Console ---
# mmengine's Runner prints several screens at its start: libraries, the whole config, which hook runs when.
# These messages go to the log file only.

_FILE_ONLY = re.compile(
    r"""
    \s*-{20,}\s*System\ environment:            # libraries and the machine
    | Config:\n                                 # the config, which is in the results folder too
    | Hooks\ will\ be\ executed\ in
    | Exp\ name:
    | "FileClient"\ will\ be\ deprecated        # mmengine's own calls, nothing a user can change
    | "HardDiskBackend"\ is\ the\ alias
    | Distributed\ training\ is\ not\ used
    | Resumed\ iteration\ number\ is\ not     # counted by epoch here: AccumulationHook
    | Gradient\ accumulative\ may\ slightly   # warns of frozen batch norms, too
    | paramwise_options\ --                     # one line a parameter
    """,
    re.VERBOSE,
)


_LINE_OF_STEPS = re.compile(r"(Epoch|Iter)\(train\) ")


class ConsoleFilter(logging.Filter):
    """Drops messages that belong in the log file only; errors always pass.

    Attributes:
        has_progress: whether a progress line shows the training: mmengine's lines of it are dropped, too.
    """

    has_progress = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is shown."""
        if record.levelno >= logging.ERROR:
            return True
        message = record.getMessage()
        return not (_FILE_ONLY.match(message) or (self.has_progress and _LINE_OF_STEPS.match(message)))


def progress_replaces_lines(logger: logging.Logger) -> None:
    """Drop mmengine's lines of training steps from a quiet console, where a progress line has the same."""
    for handler in logger.handlers:
        for known in handler.filters:
            if isinstance(known, ConsoleFilter):
                known.has_progress = True


def quiet_console(logger: logging.Logger) -> None:
    """Put the filter on a logger's console handlers, once; its file handlers stay as they are."""
    for handler in logger.handlers:
        to_console = isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        )
        if to_console and not any(isinstance(known, ConsoleFilter) for known in handler.filters):
            handler.addFilter(ConsoleFilter())


# --- Choice of algorithms ---


@dataclass(frozen=True)
class AlgorithmSettings:
    """PyTorch's process-wide switches for the choice of algorithms."""

    cudnn_benchmark: bool
    cudnn_deterministic: bool
    algorithms: bool
    only_warn: bool
    fill_memory: bool
    fast_attention: bool

    @classmethod
    def current(cls) -> AlgorithmSettings:
        """The switches as they are."""
        return cls(
            cudnn_benchmark=torch.backends.cudnn.benchmark,
            cudnn_deterministic=torch.backends.cudnn.deterministic,
            algorithms=torch.are_deterministic_algorithms_enabled(),
            only_warn=torch.is_deterministic_algorithms_warn_only_enabled(),
            fill_memory=torch.utils.deterministic.fill_uninitialized_memory,
            fast_attention=torch.backends.cuda.flash_sdp_enabled(),
        )

    def apply(self) -> None:
        """Set the switches."""
        torch.backends.cudnn.benchmark = self.cudnn_benchmark
        torch.backends.cudnn.deterministic = self.cudnn_deterministic
        torch.use_deterministic_algorithms(self.algorithms, warn_only=self.only_warn)
        torch.utils.deterministic.fill_uninitialized_memory = self.fill_memory
        # The gradients of the fused forms of attention add in any order.
        torch.backends.cuda.enable_flash_sdp(self.fast_attention)
        torch.backends.cuda.enable_mem_efficient_sdp(self.fast_attention)
        torch.backends.cuda.enable_cudnn_sdp(self.fast_attention)


# --- The Runner ---

_TIMESTAMP = "%Y%m%d_%H%M%S"
_BEGUN: set[str] = set()
"""When runs of this process began."""


@RUNNERS.register_module()
class QuietRunner(Runner):
    """mmengine's Runner with :func:`quiet_console` on its logger from the first message on.

    In a config: ``runner_type = 'QuietRunner'``; in code: ``QuietRunner.from_cfg(config)``.
    """

    _switches_before: AlgorithmSettings | None = None
    """PyTorch's switches before mmengine set them for ``randomness``."""
    _switches_of_run: AlgorithmSettings | None = None
    """Those of this runner, when a run of it has ended."""

    @classmethod
    def from_cfg(cls, cfg: Config) -> QuietRunner:
        """Build a runner as mmengine does, with a config whose text is quick to make."""
        return cast(QuietRunner, super().from_cfg(QuickTextConfig.of(cfg)))

    def setup_env(self, env_cfg: dict) -> None:
        """Set up the environment as mmengine does; a run gets a name of its own.

        mmengine names log folder, logger and message hub by the second: the next run of a notebook may begin
        in the same one, and would get the first one's. Several ranks have to agree on the name, and take
        mmengine's.
        """
        super().setup_env(env_cfg)
        moment = time.mktime(time.strptime(self._timestamp, _TIMESTAMP))
        while get_world_size() == 1 and (
            self._timestamp in _BEGUN or (Path(self._work_dir) / self._timestamp).exists()
        ):
            moment += 1
            self._timestamp = time.strftime(_TIMESTAMP, time.localtime(moment))
        _BEGUN.add(self._timestamp)

    def set_randomness(self, seed: Any, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """Set seeds and deterministic algorithms as mmengine does, and note what the switches were."""
        self._switches_before = AlgorithmSettings.current()
        super().set_randomness(seed, diff_rank_seed, deterministic)

    @contextmanager
    def _run(self) -> Iterator[None]:
        """Run with its switches; afterwards they are as before, for a notebook's next run."""
        if self._switches_of_run is not None:
            self._switches_of_run.apply()
        try:
            yield
        finally:
            self._switches_of_run = AlgorithmSettings.current()
            if self._switches_before is not None:
                self._switches_before.apply()
            end_data_workers(self)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build the logger as mmengine does, then quieten its console."""
        logger = super().build_logger(*args, **kwargs)
        quiet_console(logger)
        for handler in logger.handlers:
            # mmengine opens it in the locale's encoding, which may lack letters of class names.
            if isinstance(handler, logging.FileHandler) and hasattr(handler.stream, "reconfigure"):
                handler.stream.reconfigure(encoding="utf-8")
        return logger

    def build_visualizer(self, visualizer: Any = None) -> Any:
        """Build the visualizer as mmengine does, anew for each runner.

        mmengine keeps one a process by its name: the second run of a notebook would write into the first
        one's folder.
        """
        if isinstance(visualizer, dict):
            for kind in (Visualizer, *Visualizer.__subclasses__()):
                kind._instance_dict.pop(visualizer.get("name"), None)
        return super().build_visualizer(visualizer)

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None, diff_rank_seed: bool = False) -> Any:
        """Build a loader as mmengine does, with a limit on the time that a batch of workers may take."""
        if isinstance(dataloader, dict) and dataloader.get("num_workers"):
            dataloader = {"timeout": DATA_TIMEOUT_S, **dataloader}
        return Runner.build_dataloader(dataloader, seed, diff_rank_seed)

    def train(self) -> Any:
        """Train as mmengine does, then end the data workers and set PyTorch's switches back."""
        with self._run():
            return super().train()

    def test(self) -> dict[str, float]:
        """Test as mmengine does, then end the data workers and set PyTorch's switches back."""
        with self._run():
            return super().test()

    def dump_config(self) -> None:
        """Write the config as mmengine does, unless the file it came from is there already.

        That file has comments, which mmengine's would lack.
        """
        source = Path(self.cfg.filename or "")
        if not (source.is_file() and source.parent.resolve() == Path(self.work_dir).resolve()):
            super().dump_config()

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for training on several ranks, as mmengine does.

        Where nothing is trained it stays as it is: there are no gradients to exchange, and an exported
        graph has no parameters at all.
        """
        if self._train_loop is None:
            return model.to(get_device())
        return super().wrap_model(model_wrapper_cfg, model)
