"""The package's shape: who may import whom, what stays light, how long files and functions may be."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGE = REPO / "ddetr_mm"

# Each part of the package, with the parts that it may import. Lower lines may use higher ones, never
# the reverse; `tasks` puts everything together, and only the command line and the tools call it.
BASE = {"errors", "files", "outputs", "compat", "classes", "fonts", "html_page"}
MAY_IMPORT = {
    "errors": set(),
    "outputs": {"errors"},
    "files": {"errors", "outputs"},
    "classes": {"errors", "files"},
    "fonts": set(),
    "html_assets": set(),
    "html_page": {"html_assets"},
    "compat": {"errors", "files"},
    "__init__": {"compat"},
    "spec": {"errors", "files"},
    "weights": BASE,
    "models": BASE | {"datasets", "weights"},  # weights: GCViT reads its pretrained weights
    "datasets": BASE,
    "convert": BASE | {"datasets"},
    "evaluation": BASE | {"datasets"},
    "engine": BASE | {"convert", "datasets", "evaluation", "models", "weights"},
    "deploy": BASE | {"datasets", "models", "weights"},
    "register": BASE | {"models", "datasets", "evaluation", "engine"},
    "preflight": BASE | {"spec", "datasets", "weights", "evaluation", "engine"},
    "translate": BASE | {"spec", "datasets", "models", "weights"},
    "automl": BASE | {"spec", "engine"},
    "tasks": BASE
    | {
        "automl",
        "__init__",
        "spec",
        "datasets",
        "convert",
        "models",
        "weights",
        "evaluation",
        "engine",
        "deploy",
        "register",
    }
    | {"preflight", "translate"},
    "cli": {"__init__", "errors", "files", "outputs", "compat", "engine", "tasks"},
    "__main__": {"cli"},
}

HEAVY = {
    "torch",
    "torchvision",
    "mmengine",
    "mmcv",
    "mmdet",
    "numpy",
    "cv2",
    "matplotlib",
    "onnx",
    "onnxruntime",
}
MODULES_WITHOUT_HEAVY_IMPORTS = (
    *("__init__", "__main__", "classes", "cli", "errors", "files", "html_page", "outputs", "spec"),
    *("tasks.__init__", "tasks.compare"),
)

MOST_LINES_IN_FILE = 900
MOST_LINES_IN_FUNCTION = 80
# Longer ones, each with the reason why it is better in one piece.
LONGER_FILES: dict[str, str] = {}
LONGER_FUNCTIONS: dict[str, str] = {}


def module_name(path: Path) -> str:
    """``ddetr_mm/convert/kitti.py`` as ``data.kitti``; a package's own file as ``data.__init__``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def is_type_checking(node: ast.AST) -> bool:
    """Whether this is ``if TYPE_CHECKING:``, whose imports never run."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_nodes(root: ast.AST, inside_functions: bool) -> list[ast.Import | ast.ImportFrom]:
    """Import statements below ``root``; those in functions only when asked for."""
    found: list[ast.Import | ast.ImportFrom] = []
    waiting = list(ast.iter_child_nodes(root))
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif is_type_checking(node) or (
            not inside_functions and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            continue
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def imported(name: str, inside_functions: bool) -> set[str]:
    """Everything that a module imports, by absolute dotted name (``from a import b`` gives ``a.b`` too)."""
    path = MODULES[name]
    own_package = ["ddetr_mm", *path.relative_to(PACKAGE).parent.parts]
    names: set[str] = set()
    for node in import_nodes(tree(path), inside_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
            continue
        base = own_package[: len(own_package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        parts = {f"{source}.{alias.name}" for alias in node.names}
        # `from package import module` asks nothing of the package's own file.
        only_modules = all(part.removeprefix("ddetr_mm.") in MODULES for part in parts)
        names |= parts if only_modules else {source, *parts}
    return names


def own_imports(name: str, inside_functions: bool) -> set[str]:
    """The modules of ours that a module imports, as :func:`module_name` names them."""
    found = set()
    for target in imported(name, inside_functions):
        if target == "ddetr_mm" or not target.startswith("ddetr_mm."):
            continue
        inner = target.removeprefix("ddetr_mm.")
        if inner in MODULES:
            found.add(inner)
        elif f"{inner}.__init__" in MODULES:
            found.add(f"{inner}.__init__")
        elif inner == "__version__":
            found.add("__init__")
    return found - {name}


def layer(name: str) -> str:
    """The part of the package that a module belongs to."""
    return name.partition(".")[0]


# --- direction ---


def test_every_part_has_its_place():
    assert {layer(name) for name in MODULES} <= set(MAY_IMPORT)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    here = layer(name)
    wrong = {
        target
        for target in own_imports(name, inside_functions=True)
        if layer(target) not in MAY_IMPORT[here] | {here}
    }
    assert not wrong, f"{name} is in {here}, which may import {sorted(MAY_IMPORT[here])}, not {sorted(wrong)}"


def test_directions_have_no_circle():
    order: list[str] = []
    waiting = dict(MAY_IMPORT)
    while waiting:
        free = [part for part, uses in waiting.items() if not uses & set(waiting)]
        assert free, f"these parts may import each other in a circle: {sorted(waiting)}"
        order += free
        for part in free:
            del waiting[part]
    assert order[0] == "errors" and order[-1] == "__main__"


def test_no_import_cycles_among_modules():
    graph = {name: own_imports(name, inside_functions=False) for name in MODULES}
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in finished:
            for target in sorted(graph[name]):
                visit(target, [*trail, name])
            finished.add(name)

    for name in graph:
        visit(name, [])
    assert finished == set(MODULES)


# --- weight ---


@pytest.mark.parametrize("part", MODULES_WITHOUT_HEAVY_IMPORTS)
def test_light_parts_import_nothing_heavy(part):
    # The spec imports none of it anywhere; the others may, inside a function, when they are at work.
    everywhere = part == "spec"
    for name in MODULES:
        if name == part or name.startswith(f"{part}."):
            heavy = {
                target.partition(".")[0] for target in imported(name, inside_functions=everywhere)
            } & HEAVY
            assert not heavy, f"{name} imports {sorted(heavy)}"


# Modules whose distribution has another name, or comes with one that is declared.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "cv2": "mmengine",
    "mmcv": None,
    "pkg_resources": "setuptools",
}
# What a user may have or not; imported inside functions only, and missing it is told or done without.
OPTIONAL = {
    *("hotcoco", "tensorrt", "mmdeploy", "orjson", "triton", "cryptography", "wandb", "supervision"),
    *("optuna", "sqlalchemy"),  # the second comes with the first
    "torch_linear_assignment",
}
# Imported by the optional package itself, as its configs demand, or by ours when the package is there.
LOADED_BY = {"deploy.mmdeploy_rewriters": {"mmdeploy"}, "models.triton_kernels": {"triton"}}


def test_third_party_imports_are_declared():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[<>=\[;! ]", line)[0] for line in project["dependencies"]}
    for name in MODULES:
        at_once = {target.partition(".")[0] for target in imported(name, inside_functions=False)}
        everywhere = {target.partition(".")[0] for target in imported(name, inside_functions=True)}
        foreign = everywhere - set(sys.stdlib_module_names) - {"ddetr_mm"}
        needed = at_once & OPTIONAL - LOADED_BY.get(name, set())
        assert not needed, f"{name} cannot be imported without {sorted(needed)}"
        for module in foreign - OPTIONAL:
            distribution = DISTRIBUTIONS.get(module, module)
            assert distribution is None or distribution in declared, f"{name} imports {module}: not declared"


def loaded_by(code: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after ``code``."""
    told = f"{code}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    answer = subprocess.run(
        [sys.executable, "-c", told], capture_output=True, text=True, env=environment, check=True
    )
    return set(answer.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["-h"], ["train", "-h"], ["--version"]], ids=" ".join)
def test_help_loads_nothing_heavy(arguments):
    code = f"from ddetr_mm.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass"
    loaded = loaded_by(code)
    assert "ddetr_mm" in loaded
    assert not loaded & (HEAVY | {"pydantic", "yaml"})


# --- size ---


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_short(name):
    path = MODULES[name]
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES_IN_FILE or name in LONGER_FILES, f"{name} has {lines} lines"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            full_name = f"{name}.{node.name}"
            assert length <= MOST_LINES_IN_FUNCTION or full_name in LONGER_FUNCTIONS, (
                f"{full_name}: {length} lines"
            )


def test_exceptions_to_the_sizes_are_still_needed():
    for name in LONGER_FILES:
        assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) > MOST_LINES_IN_FILE
    for full_name in LONGER_FUNCTIONS:
        module, _, function = full_name.rpartition(".")
        lengths = [
            node.end_lineno - node.lineno + 1
            for node in ast.walk(tree(MODULES[module]))
            if isinstance(node, ast.FunctionDef) and node.name == function
        ]
        assert max(lengths) > MOST_LINES_IN_FUNCTION


# --- what is in the repository ---


def tracked_files() -> list[Path]:
    """The files that git knows; skipped where this is no checkout."""
    answer = subprocess.run(
        ["git", "-C", str(REPO), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        pytest.skip("this is no git checkout")
    return [REPO / name for name in answer.stdout.split("\0") if name and (REPO / name).is_file()]


# A picture for the README is worth its bytes; weights, data and models are not kept here.
PICTURES = {".png", ".jpg", ".svg"}
MOST_PICTURE_BYTES = 600_000
# The outputs that fidelity tests compare with.
GOLDEN = REPO / "tests" / "golden"
MOST_GOLDEN_BYTES = 2_000_000


def is_golden_array(path: Path) -> bool:
    """Whether a file may be binary since it holds arrays that tests compare with."""
    return path.parent == GOLDEN and path.suffix == ".npz"


# A checkpoint saved with a library that the tests do not install.
SAMPLE_CHECKPOINTS = {REPO / "tests" / "assets" / "omegaconf_2.4.ckpt"}
MOST_SAMPLE_BYTES = 10_000
# Damaged files that tests start from; most are text, some are not.
CORPUS = REPO / "tests" / "test_faults" / "corpus"


# Spelt in parts, so that this file does not hold them.
FORBIDDEN_TEXT = [
    re.compile(r"(?<![\w./])/(?:work|root|home/\w+)/"),
    re.compile(
        r"\b(?:files\.)?py" + r"thonhosted\.org|\bpy" + r"pi\.(?:org|python\.org)|registry\.npm" + r"js\.org"
    ),
]


def test_tracked_files_are_text_or_small_pictures():
    for path in tracked_files():
        content = path.read_bytes()
        if path.suffix in PICTURES:
            assert len(content) <= MOST_PICTURE_BYTES, f"{path.name} has {len(content)} bytes"
        elif is_golden_array(path):
            assert len(content) <= MOST_GOLDEN_BYTES, f"{path.name} has {len(content)} bytes"
        elif path in SAMPLE_CHECKPOINTS or CORPUS in path.parents:
            assert len(content) <= MOST_SAMPLE_BYTES, f"{path.name} has {len(content)} bytes"
        else:
            assert b"\0" not in content, f"{path.name} is binary"


def test_only_arrays_in_the_golden_folder_may_be_binary():
    assert is_golden_array(GOLDEN / "a.npz")
    others = [GOLDEN / "a.pth", GOLDEN / "contract" / "a.npz", GOLDEN.parent / "a.npz"]
    assert not any(is_golden_array(path) for path in others)


def test_tracked_files_name_no_machine_and_no_package_index():
    for path in tracked_files():
        if path.suffix in PICTURES - {".svg"} or is_golden_array(path) or path in SAMPLE_CHECKPOINTS:
            continue
        errors = "replace" if CORPUS in path.parents else "strict"
        for number, line in enumerate(path.read_text(encoding="utf-8", errors=errors).splitlines(), 1):
            for pattern in FORBIDDEN_TEXT:
                match = pattern.search(line)
                assert not match, f"{path.relative_to(REPO)}:{number} holds {match[0]!r}"


def test_no_two_test_files_share_a_name():
    # Without packages pytest tells test modules apart by their base names alone.
    names = Counter(path.name for path in (REPO / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
