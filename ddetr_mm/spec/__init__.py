"""TAO specs: schema, loading, checking, printing. Knows nothing of torch or OpenMMLab."""

from .load import LoadedSpec, Spec, load_spec
from .schema import ConvertSpec, ExperimentSpec
from .walk import SUBTASKS, FieldInfo, iter_fields

__all__ = [
    "SUBTASKS",
    "ConvertSpec",
    "ExperimentSpec",
    "FieldInfo",
    "LoadedSpec",
    "Spec",
    "iter_fields",
    "load_spec",
]
