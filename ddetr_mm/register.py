"""The only import for its side effect: registers every class of this package with mmdet.

In an mmengine config: ``custom_imports = dict(imports=['ddetr_mm.register'])``. It also lets mmengine read
its own checkpoints on a torch that refuses unknown classes, and quietens what a user can do nothing about:
mmengine's list of frozen parameters, and warnings about calls inside mmdet and mmengine and about a machine
without GPU.
"""

import warnings

import ddetr_mm.data.dataset
import ddetr_mm.data.image_folder
import ddetr_mm.data.samplers
import ddetr_mm.data.transforms
import ddetr_mm.data.whole_batches
import ddetr_mm.evaluation.metric
import ddetr_mm.models
import ddetr_mm.runtime.alarm_hook
import ddetr_mm.runtime.checkpoint_hook
import ddetr_mm.runtime.cudnn_hook
import ddetr_mm.runtime.curves
import ddetr_mm.runtime.detection_writer
import ddetr_mm.runtime.effective_batch
import ddetr_mm.runtime.learning_rate_hook
import ddetr_mm.runtime.mixed_precision
import ddetr_mm.runtime.non_finite_hook
import ddetr_mm.runtime.pretrained_hook
import ddetr_mm.runtime.progress_hook
import ddetr_mm.runtime.replaced_images_hook
import ddetr_mm.runtime.sharded_runner
import ddetr_mm.runtime.status_hook
import ddetr_mm.runtime.stop_signals
import ddetr_mm.runtime.time_ledger_hook
import ddetr_mm.runtime.train_loop
import ddetr_mm.runtime.wandb_backend  # noqa: F401 - imported for registration
from ddetr_mm.runtime.encrypted_load import register_encrypted_loading
from ddetr_mm.stack.mends import (
    allow_mmengine_checkpoint_classes,
    find_our_configs,
    quiet_frozen_parameter_warnings,
)

allow_mmengine_checkpoint_classes()
find_our_configs()
register_encrypted_loading()
quiet_frozen_parameter_warnings()
warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
# Nothing here changes a loss in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
