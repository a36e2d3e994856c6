"""Imports: they point one way, `import motionrag` is quick and does nothing, and base dependencies are enough."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import motionrag

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

PACKAGE = Path(motionrag.__file__).parent
ROOT = PACKAGE.parent

# DESIGN, section 3. The first name that fits a path below the package decides.
LAYERS = {
    "video": 0,
    "decoding": 0,
    "sheet": 0,
    "trajectory": 0,
    "encoders": 1,
    "models": 1,
    "adapters": 1,
    "backbones": 1,
    "database": 2,
    "bundle": 2,
    "encoder": 2,
    "convert": 2,
    "convert_motionpro": 2,
    "conversion": 2,
    "key_maps": 2,
    "model_card": 2,
    "pipeline": 3,
    "control": 3,
    "generation": 3,
    "suggestion": 3,
    "output": 3,
    "tracking": 3,
    "training": 4,
    "evaluation": 4,
    "pocket": 4,
    "cli": 5,
    "app": 5,
    "__main__": 5,
}
FILES = sorted(PACKAGE.rglob("*.py"))
# What an extra brings; none of it may be needed to import anything.
OPTIONAL = (
    "cv2",
    "faiss",
    "pytorch_lightning",
    "lightning",
    "ray",
    "gradio",
    "torchcodec",
    "peft",
    "decord",
    "jsonargparse",
)


def dotted(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module):
    parts = module.split(".")
    return LAYERS[parts[1]] if len(parts) > 1 else None


def imported_modules(path, *, everywhere=True):
    """Absolute names of all modules that a file imports, also inside functions and for type checking."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = dotted(path) if path.name == "__init__.py" else dotted(path).rpartition(".")[0]
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            yield base
            # `from motionrag import bundle` names a module, not only the package.
            yield from (f"{base}.{alias.name}" for alias in node.names if base == "motionrag")


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_a_file_imports_its_own_layer_or_a_lower_one(path):
    module = dotted(path)
    if module == "motionrag":
        return
    own = layer_of(module)
    for name in imported_modules(path):
        if name.startswith("motionrag.") and name.split(".")[1] in LAYERS:
            assert layer_of(name) <= own, f"{module} (layer {own}) imports {name} (layer {layer_of(name)})"


def test_every_file_has_a_layer():
    unknown = [
        dotted(path) for path in FILES if dotted(path) != "motionrag" and dotted(path).split(".")[1] not in LAYERS
    ]
    assert unknown == []


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_only_training_knows_lightning(path):
    if dotted(path).startswith("motionrag.training"):
        return
    roots = {name.split(".")[0] for name in imported_modules(path)}
    assert not roots & {"lightning", "pytorch_lightning"}


@pytest.mark.parametrize("path", [path for path in FILES if layer_of(dotted(path)) == 0], ids=dotted)
def test_the_lowest_layer_needs_no_torch_to_be_imported(path):
    roots = {name.split(".")[0] for name in imported_modules(path, everywhere=False)}
    assert not roots & {"torch", "torchvision", "diffusers", "transformers", "faiss", "lance"}


def test_models_need_torch_and_einops_only():
    for path in (PACKAGE / "models").glob("*.py"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert roots - set(sys.stdlib_module_names) <= {"torch", "einops", "motionrag"}


def test_modules_import_only_base_dependencies_at_the_top():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {entry.split(";")[0].split(">")[0].split("[")[0].strip() for entry in project["dependencies"]}
    import_names = {"open_clip_torch": "open_clip", "pillow": "PIL", "pylance": "lance"}
    allowed = {import_names.get(name, name.replace("-", "_")) for name in declared}
    for path in FILES:
        roots = {name.split(".")[0] for name in imported_modules(path, everywhere=False)}
        # Training as a whole needs its extra; the command line says so.
        extra = {"pytorch_lightning", "jsonargparse"} if dotted(path).startswith("motionrag.training") else set()
        surplus = roots - allowed - extra - set(sys.stdlib_module_names) - {"motionrag"}
        assert not surplus, f"{dotted(path)} imports {surplus} at its top"


def fresh(code, tmp_path, **environment):
    """Run code in a new process, in an empty folder, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import os, sys, threading, time
before = dict(os.environ)
start = time.perf_counter()
import motionrag
seconds = time.perf_counter() - start
assert dict(os.environ) == before, "the environment changed"
assert threading.active_count() == 1
heavy = {"torch", "numpy", "diffusers", "transformers", "lance", "faiss", "av", "decord", "PIL", "pyarrow"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
print(seconds)
"""


def test_importing_the_package_is_quick_and_does_nothing(tmp_path):
    home = tmp_path / "home"
    work = tmp_path / "work"
    home.mkdir(), work.mkdir()
    seconds = min(float(fresh(IMPORT, work, HOME=str(home), TMPDIR=str(home))) for _ in range(3))
    assert seconds < 0.5
    assert list(home.rglob("*")) == []
    assert list(work.rglob("*")) == []


def test_the_command_line_starts_without_torch(tmp_path):
    fresh("import sys, motionrag.cli; assert 'torch' not in sys.modules", tmp_path)


ALL_MODULES = """
import importlib, sys
for name in {optional!r}:
    sys.modules[name] = None  # importing it fails
for name in {modules!r}:
    importlib.import_module(name)
import motionrag
for name in motionrag.__all__:
    assert getattr(motionrag, name) is not None
"""


def test_every_module_imports_with_the_base_dependencies(tmp_path):
    modules = [dotted(path) for path in FILES if path.name != "__main__.py" and ".training" not in dotted(path)]
    fresh(ALL_MODULES.format(optional=OPTIONAL, modules=modules), tmp_path)


def test_public_names():
    for name in motionrag.__all__:
        value = getattr(motionrag, name)
        assert value.__name__ == name
        assert value.__doc__
    assert {*motionrag.__all__, "__version__"} == set(dir(motionrag))
    with pytest.raises(AttributeError, match=r"no attribute 'Pipeline'; it offers Clip"):
        motionrag.Pipeline  # noqa: B018


def test_the_version_is_that_of_the_distribution():
    from importlib.metadata import version

    assert version("motionrag") == motionrag.__version__


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
