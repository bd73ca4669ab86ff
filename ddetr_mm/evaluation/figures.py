"""Matplotlib figures that give their memory back when they have been drawn."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ddetr_mm.data.gc_pause import garbage_collection_paused
from ddetr_mm.files import written_whole


@contextmanager
def freed_figures() -> Iterator[None]:
    """Free the figures that are made within; as a decorator, those of a function.

    A figure, its axes and its canvas refer to each other, so only Python's search for unreachable cycles
    frees them: about 8 MB each. The full search is rare in a long run and slow, and until then every drawing
    adds to the process. Here nothing is searched while the figures grow, so they are all among the youngest
    objects at the end, and searching those alone takes milliseconds.
    """
    with garbage_collection_paused():
        try:
            yield
        finally:
            gc.collect(0)


def save_png(path: str | Path, figure: Figure) -> Path:
    """Draw a figure into a PNG file, written whole or not at all.

    The figure gets a canvas of its own: pyplot would keep every figure, and pick a display.
    """
    canvas = FigureCanvasAgg(figure)
    with written_whole(path) as temporary:
        canvas.print_png(temporary)
    return Path(path)
