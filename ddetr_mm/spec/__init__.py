"""TAO specs: schema, loading, checking, printing. Knows nothing of torch or OpenMMLab."""

from ddetr_mm.spec.document import default_spec_text
from ddetr_mm.spec.dump import spec_to_yaml
from ddetr_mm.spec.fieldpath import get_field
from ddetr_mm.spec.load import LoadedSpec, Spec, load_spec
from ddetr_mm.spec.results import task_results_dir
from ddetr_mm.spec.schema import ConvertSpec, ExperimentSpec
from ddetr_mm.spec.walk import SUBTASKS, FieldInfo, iter_fields

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
