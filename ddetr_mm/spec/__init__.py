"""TAO specs: schema, loading, checking, printing. Knows nothing of torch or OpenMMLab."""

from .document import default_spec_text
from .dump import spec_to_yaml
from .fieldpath import get_field
from .load import LoadedSpec, Spec, load_spec
from .results import task_results_dir
from .schema import ConvertSpec, ExperimentSpec
from .walk import SUBTASKS, FieldInfo, iter_fields

__all__ = [
    "SUBTASKS",
    "ConvertSpec",
    "ExperimentSpec",
    "FieldInfo",
    "LoadedSpec",
    "Spec",
    "default_spec_text",
    "get_field",
    "iter_fields",
    "load_spec",
    "spec_to_yaml",
    "task_results_dir",
]
