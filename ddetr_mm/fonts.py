"""Fonts for text on pictures: a font that has the letters of a class name, in whatever script it is.

Tried are Pillow's own font, DejaVu Sans (bundled with matplotlib) and the fonts of the system. A name that
none of them covers is written in Latin letters.
"""

from __future__ import annotations

import functools
import io
import logging
import re
import unicodedata
from collections.abc import Iterable

from PIL import ImageFont

logger = logging.getLogger(__name__)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_ALWAYS = frozenset("0123456789. ")
_NO_TEXT_FONTS = re.compile(r"Last Resort|STIX(Non|Size)|cm[a-z]+10|Math", re.IGNORECASE)
_SPELLED = re.compile(r"(?:LETTER|SYLLABLE|CHARACTER|SIGN|DIGIT) (.+?)(?: WITH .*)?$")


@functools.lru_cache(maxsize=4096)
def label_font(text: str, size: int) -> tuple[Font, str]:
    """A font for a label, and the label as it can be drawn.

    Args:
        text: a class name, or a sentence with one.
        size: height of the letters, pixels.

    Returns:
        The font, which also has digits, and ``text``; where no font covers it, ``text`` in Latin letters,
        which is logged once.
    """
    path = covering_font(text)
    if path == "":
        return _pillow_font(size), text
    if path is not None:
        return ImageFont.truetype(path, size), text
    shown = latin_letters(text)
    _log_spelling(text, shown)
    return _pillow_font(size), shown


def covering_font(text: str) -> str | None:
    """The first font file that has every letter of a text; empty for Pillow's own font, None for none."""
    wanted = {letter for letter in text if not unicodedata.category(letter).startswith("C")} | _ALWAYS
    if wanted <= _pillow_letters():
        return ""
    return next((path for path in _font_files() if _covers(path, wanted)), None)


def font_families(texts: Iterable[str]) -> list[str]:
    """Families for matplotlib's ``font.family`` that together have the letters of all texts."""
    from matplotlib.font_manager import FontProperties, fontManager

    families = ["DejaVu Sans"]
    names = {entry.fname: entry.name for entry in fontManager.ttflist}
    for text in dict.fromkeys(texts):
        path = covering_font(text)
        family = names.get(path) if path else None
        if family is not None and family not in families and FontProperties(family=family):
            families.append(family)
    return families


def latin_letters(text: str) -> str:
    """A text spelled in Latin letters by the names that Unicode gives its letters.

    Accents are left out (``é`` is ``e``), letters of other scripts become their names (``가`` is ``ga``), and
    ideographs, which have none, their numbers (``人`` is ``U+4EBA``).
    """
    parts = []
    for letter in unicodedata.normalize("NFKD", text) if not _has_hangul(text) else text:
        if letter in _pillow_letters():
            parts.append(letter)
        elif not unicodedata.combining(letter):
            spelled = _SPELLED.search(unicodedata.name(letter, ""))
            parts.append(spelled.group(1).lower() if spelled else f"U+{ord(letter):04X}")
    return "".join(parts)


def _has_hangul(text: str) -> bool:
    """Whether a text has Korean syllables, which normalisation would take apart."""
    return any("가" <= letter <= "힣" for letter in text)


@functools.lru_cache(maxsize=1024)
def _log_spelling(text: str, shown: str) -> None:
    logger.warning("no font here has the letters of %s: it is drawn as %s", text, shown)


@functools.lru_cache(maxsize=64)
def _pillow_font(size: int) -> Font:
    return ImageFont.load_default(size=size)


@functools.cache
def _pillow_letters() -> frozenset[str]:
    """The letters of Pillow's own font."""
    from matplotlib.ft2font import FT2Font

    content = getattr(_pillow_font(12), "font_bytes", None)
    if content is None:  # a Pillow without FreeType: its bitmap font
        return frozenset(map(chr, range(32, 127)))
    return frozenset(map(chr, FT2Font(io.BytesIO(content)).get_charmap()))


@functools.cache
def _font_files() -> tuple[str, ...]:
    """Font files: DejaVu Sans first, then plain sans-serif ones, then the others."""
    from matplotlib.font_manager import fontManager

    def rank(entry: object) -> tuple[bool, bool, bool, str]:
        name, style, weight = (getattr(entry, key) for key in ("name", "style", "weight"))
        plain = style == "normal" and weight in (400, "normal", "regular")
        return name != "DejaVu Sans" or not plain, not plain, "Sans" not in name, str(name)

    entries = [entry for entry in fontManager.ttflist if not _NO_TEXT_FONTS.search(entry.name)]
    return tuple(dict.fromkeys(entry.fname for entry in sorted(entries, key=rank)))


@functools.lru_cache(maxsize=256)
def _letters_of(path: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    except (OSError, RuntimeError):  # deleted or damaged since the list was made
        return frozenset()


def _covers(path: str, wanted: set[str] | frozenset[str]) -> bool:
    return wanted <= _letters_of(path)
