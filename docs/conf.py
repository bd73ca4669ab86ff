"""Sphinx: ``make docs`` builds the site into ``build/docs``.

The source folder is the repository's root, so that pages link to projects, records and code as they
do on disk: ``sphinx-build -c docs . build/docs``.
"""

from ddetr_mm import __version__

project = "ddetr_mm"
release = __version__
extensions = ["myst_nb"]  # myst_parser, and notebooks
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/tour.ipynb",
    "projects/README.md",
    "projects/*/README.md",
    "benchmarks/records/*.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
# Pruned, or Sphinx would look through the environments too.
exclude_patterns = [".*", "build", "dist", "results", "work_dirs", "ddetr_mm", "tests", "tools", "configs"]
nb_execution_mode = "off"  # its outputs are stored by docs/generate.py --tour
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"ddetr_mm {__version__}"
html_extra_path = ["_root"]  # index.html at the top leads to docs/index.html
html_static_path = ["_static"]
html_js_files = ["filter.js"]
html_show_copyright = False
