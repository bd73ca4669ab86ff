"""The text of a run's config, formatted once.

mmengine formats a config each time that its text is wanted, which takes about half a second: four times when
a Runner starts, and once with every checkpoint.
"""

from __future__ import annotations

from mmengine.config import Config


class FormattedOnceConfig(Config):
    """A ``Config`` that formats its text again only when its content has changed."""

    @property
    def pretty_text(self) -> str:
        """The config as formatted Python code."""
        content = repr(self._cfg_dict)
        known = self.__dict__.get("_formatted")
        if known is None or known[0] != content:
            known = (content, super().pretty_text)
            self.__dict__["_formatted"] = known  # past Config's own attributes, which are config fields
        return str(known[1])

    @classmethod
    def of(cls, config: Config) -> FormattedOnceConfig:
        """A copy of a config, as one of these."""
        made = cls.__new__(cls)
        made.__setstate__(config.copy().__getstate__())
        return made
