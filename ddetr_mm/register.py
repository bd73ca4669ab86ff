"""Import for its side effect: registers every class of this package with mmdet and mmengine.

In an mmengine config: ``custom_imports = dict(imports=['ddetr_mm.register'])``. The import also applies the
patches of :data:`ddetr_mm.compat.patches.AT_REGISTRATION`.
"""

import ddetr_mm.datasets.coco
import ddetr_mm.datasets.samplers
import ddetr_mm.datasets.transforms
import ddetr_mm.engine.alarms
import ddetr_mm.engine.checkpoint
import ddetr_mm.engine.curves
import ddetr_mm.engine.detections
import ddetr_mm.engine.fsdp
import ddetr_mm.engine.hooks
import ddetr_mm.engine.model_selection
import ddetr_mm.engine.non_finite
import ddetr_mm.engine.optimization
import ddetr_mm.engine.resume_state
import ddetr_mm.engine.train_loop
import ddetr_mm.engine.wandb
import ddetr_mm.evaluation.metric
import ddetr_mm.models  # noqa: F401 - all imported for registration
from ddetr_mm.compat.patches import AT_REGISTRATION, apply_patches

apply_patches(AT_REGISTRATION)
