"""No code from data: an AST test over every file that ships or runs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path for folder in ("motionrag", "benchmarks", "db", "configs") for path in (ROOT / folder).rglob("*.py")
)
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {"extractall", "unsafe_load", "full_load", "read_pickle", "to_pickle"}
FORBIDDEN_DOTTED = {"os.system", "os.popen", "yaml.load", "tempfile.mktemp", "torch.hub.load", "torch.jit.load"}
# Published weights, and ATI's track files.
READS_CHECKPOINTS = ("motionrag/convert.py", "motionrag/trajectory/formats/ati.py")


def dotted(node):
    """`a.b.c` of an expression, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        start = dotted(node.value)
        return f"{start}.{node.attr}" if start else ""
    return ""


def literal(node):
    return node.value if isinstance(node, ast.Constant) else None


def faults(source, path=""):
    """What in a file is forbidden, as sentences with line numbers."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module or ""] if module else [alias.name for alias in node.names]
            for name in names:
                if name.split(".")[0] in FORBIDDEN_MODULES:
                    yield f"line {node.lineno}: imports {name}"
            if module in ("os", "torch", "yaml") and any(
                f"{module}.{alias.name}" in {*FORBIDDEN_DOTTED, "torch.load"} for alias in node.names
            ):
                yield f"line {node.lineno}: imports a forbidden function of {module}"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in FORBIDDEN_CALLS | FORBIDDEN_DOTTED or method in FORBIDDEN_METHODS:
            yield f"line {node.lineno}: calls {name or method}"
        if "shell" in given and literal(given["shell"]) is not False:
            yield f"line {node.lineno}: shell"
        if "trust_remote_code" in given and literal(given["trust_remote_code"]) is not False:
            yield f"line {node.lineno}: trust_remote_code"
        if "allow_pickle" in given and literal(given["allow_pickle"]) is not False:
            yield f"line {node.lineno}: allow_pickle"
        if name == "torch.load" and not (path in READS_CHECKPOINTS and literal(given.get("weights_only")) is True):
            yield f"line {node.lineno}: torch.load"
        if method == "load_state_dict" and (
            ("strict" in given and literal(given["strict"]) is not True) or len(node.args) > 1
        ):
            yield f"line {node.lineno}: load_state_dict that is not strict"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe(path):
    relative = path.relative_to(ROOT).as_posix()
    assert list(faults(path.read_text(encoding="utf-8"), relative)) == []


def test_checkpoints_are_read_in_two_places_with_weights_only():
    users = [path.relative_to(ROOT).as_posix() for path in FILES if "torch.load(" in path.read_text(encoding="utf-8")]
    assert sorted(users) == sorted(READS_CHECKPOINTS)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal, json",
        "import shelve as s",
        "yaml.load(text)",
        "archive.extractall(folder)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "eval('1')",
        "exec(code)",
        "os.system('ls')",
        "from os import system",
        "from torch import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=True)",
        "Model.from_pretrained(x, trust_remote_code=True)",
        "Model.from_pretrained(x, trust_remote_code=flag)",
        "model.load_state_dict(state, strict=False)",
        "model.load_state_dict(state, False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_test_finds(source):
    assert list(faults(source))


def test_the_test_lets_through():
    allowed = "torch.load(path, map_location='cpu', weights_only=True)"
    assert not list(faults(allowed, READS_CHECKPOINTS[0]))
    assert list(faults("torch.load(path, weights_only=flag)", READS_CHECKPOINTS[0]))
    for source in (
        "zip(a, b, strict=False)",
        "yaml.safe_load(text)",
        "m.load_state_dict(s, strict=True)",
        "re.compile(p)",
    ):
        assert not list(faults(source))
