"""TAO specs: schema, loading, checking, printing. Imports neither torch nor OpenMMLab."""

from ddetr_mm.spec.describe import (
    FieldInfo,
    default_spec_text,
    iter_fields,
    spec_to_yaml,
    task_results_dir,
)
from ddetr_mm.spec.fields import get_field
from ddetr_mm.spec.load import LoadedSpec, load_spec
from ddetr_mm.spec.schema import SUBTASKS, ConvertSpec, ExperimentSpec, Spec

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
