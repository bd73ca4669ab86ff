"""Translates an experiment spec into an mmengine config; only this package knows the fields of both."""

from ddetr_mm.compat.config_text import ConfigDraft, Section
from ddetr_mm.translate.to_config import SUBTASKS, spec_config_text, to_config

__all__ = ["SUBTASKS", "ConfigDraft", "Section", "spec_config_text", "to_config"]
