"""Sphinx: ``make docs`` builds the site into ``build/docs``."""

from ddetr_mm import __version__

project = "ddetr_mm"
release = __version__
extensions = ["myst_parser"]
html_theme = "furo"
html_title = f"ddetr_mm {__version__}"
exclude_patterns = ["*.py"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository; tests/test_docs follows them
