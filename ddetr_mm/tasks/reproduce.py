"""``ddetr-mm reproduce``: repeat the step of a saved batch whose loss or gradients were not finite."""

from __future__ import annotations

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

from ddetr_mm.errors import Problem, SpecError
from ddetr_mm.spec import load_spec
from ddetr_mm.tasks.session import encryption_key_of


def run(arguments: Namespace) -> None:
    """Repeat the step on the saved weights and tell where values stop being finite.

    Raises:
        SpecError: the run's config does not exist.
    """
    spec = load_spec(arguments.experiment_spec).spec if arguments.experiment_spec else None
    batch_file = Path(arguments.batch)
    config_file = Path(arguments.config or batch_file.with_name("config.py"))
    if not config_file.is_file():
        raise SpecError(
            Problem("the run's config does not exist", file=config_file, hint="name it: --config CONFIG")
        )
    import torch
    from mmdet.registry import MODELS
    from mmengine.config import Config

    import ddetr_mm.register  # noqa: F401 - what the config names
    from ddetr_mm.engine.non_finite import find_first_non_finite, load_batch
    from ddetr_mm.tasks.runner import register_scope

    with encryption_key_of(spec):
        saved = load_batch(batch_file)
    config = Config.fromfile(str(config_file))
    register_scope(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MODELS.build(config.model)
    model.load_state_dict(saved["state_dict"])
    model.to(device).train()
    if hasattr(getattr(model, "bbox_head", None), "tolerates_non_finite"):
        model.bbox_head.tolerates_non_finite = True
    about = saved["about"]
    dtype = {"torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16}.get(about["precision"])
    autocast = torch.autocast(device, dtype) if dtype else nullcontext()
    finding = find_first_non_finite(model, saved["batch"], saved["rng_state"], autocast)
    print(f"{about['what']} in step {about['step']}, {about['precision']}, on {device}")
    print("images: " + ", ".join(about["images"]))
    print(finding)
