"""Spec → mmengine config. Nothing outside this package knows both vocabularies."""

from ddetr_mm.translate.to_config import SUBTASKS, spec_config_text, to_config
from ddetr_mm.translate.write import ConfigDraft, Section

__all__ = ["SUBTASKS", "ConfigDraft", "Section", "spec_config_text", "to_config"]
