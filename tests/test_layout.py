"""The house rules of the source: what each folder holds, and what each may import."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

import vistoken
from vistoken.registry import method_class, method_names

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "adapters", "eval")
MAX_LINES = 400


@cache
def python_files() -> tuple[str, ...]:
    """Every source file of the repository, as posix paths from its root."""
    rooms = ("vistoken", *FOLDERS, "tests", "examples")
    found = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in found))


# --- what an import statement asks for -----------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """One imported name: `target` is absolute, with the imported name as its last part."""

    line: int
    target: str
    eager: bool  # runs as the file is imported: not in a function, not for type checkers only
    binds: str | None  # the name it gives a value in the file

    @property
    def head(self) -> str:
        return self.target.partition(".")[0]

    def within(self, *modules: str) -> bool:
        return any((self.target + ".").startswith(module + ".") for module in modules)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _dynamic_target(node: ast.Call) -> str | None:
    """The module named by `import_module("x")`, or the constant beginning of an f-string."""
    if not ast.unparse(node.func).endswith(("import_module", "__import__")) or not node.args:
        return None
    name = node.args[0]
    if isinstance(name, ast.JoinedStr) and name.values:
        name = name.values[0]
    return name.value.rstrip(".") if isinstance(name, ast.Constant) else None


def imports_of(source: str, package: str) -> list[Import]:
    """All imports of a file of `package`, in functions too, and uses such as `vistoken.x`."""

    def visit(node: ast.AST, eager: bool) -> Iterator[Import]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            eager = False
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(node.lineno, name.name, eager, name.asname or name.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            for name in node.names:
                yield Import(node.lineno, f"{base}.{name.name}", eager, name.asname or name.name)
        elif isinstance(node, ast.Call) and (target := _dynamic_target(node)):
            yield Import(node.lineno, target, eager, None)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vistoken":
            yield Import(node.lineno, f"vistoken.{node.attr}", eager, None)
        if _is_type_checking(node):
            for child in [*node.body, *node.orelse]:
                yield from visit(child, eager and child in node.orelse)
            return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, eager)

    return list(visit(ast.parse(source), True))


# --- the rules -----------------------------------------------------------------------------------

# What users import; `eval/`, the commands and the examples live on this alone.
PUBLIC = tuple(
    f"vistoken.{name}"
    for name in ("errors", "kernels", "eval", "picture", "pruning", "grounding", "attention")
)
ANY = None


@dataclass(frozen=True)
class Room:
    """What the files of one room may import."""

    own: tuple[str, ...]  # parts of vistoken
    not_own: tuple[str, ...] = ()  # and of those, not these
    public_only: bool = False
    eager: frozenset[str] | None = frozenset({"torch"})  # other packages as the file is imported
    lazy: frozenset[str] | None = ANY  # other packages inside functions
    exact: bool = False  # `own` names single modules


TORCH = frozenset({"torch"})
TERMINAL = frozenset({"torch", "typer", "rich"})  # with torch, the required dependencies
OUTER = ("vistoken.adapters", "vistoken.eval", "vistoken.commands")
KERNELS = ("vistoken.errors", "vistoken.kernels")
COMMANDS = (*PUBLIC, "vistoken.commands")

ROOMS = {
    "kernels": Room(KERNELS, lazy=TORCH | {"natten"}),
    "kernels, triton": Room(KERNELS, eager=TORCH | {"triton"}, lazy=TORCH | {"triton"}),
    "door": Room(("vistoken._folders", *(f"vistoken.{name}" for name in FOLDERS))),
    "method": Room(("vistoken",), OUTER, lazy=TORCH),
    "registry": Room(("vistoken",), OUTER[1:]),
    "core": Room(("vistoken",), OUTER),
    "adapters": Room(("vistoken",), OUTER[1:]),
    "eval": Room(PUBLIC, public_only=True, eager=TERMINAL | {"numpy", "PIL"}),
    "commands": Room(COMMANDS, public_only=True, eager=TERMINAL),
    "examples": Room(PUBLIC, public_only=True, eager=ANY),
    "tests": Room(("vistoken",), eager=ANY),
}


def is_triton(module: str) -> bool:
    """Whether a module of kernels/ is Triton code, by its name: `a_triton`, `hopper_a`."""
    return bool({"triton", "hopper"} & set(module.split("_")))


def room_of(path: str) -> str:
    """The room that a file of the repository belongs to."""
    first, *rest = PurePosixPath(path).parts
    if first == "kernels" and is_triton(PurePosixPath(path).stem):
        return "kernels, triton"
    if first != "vistoken":
        return first
    if rest[0] in ("pruning", "grounding", "attention"):
        return "method"
    if rest[0] in ("commands", "__main__.py"):
        return "commands"
    if rest in ([f"{name}.py"] for name in FOLDERS):
        return "door"
    return "registry" if rest == ["registry.py"] else "core"


def package_of(path: str) -> str:
    """The package of a file, as its relative imports see it."""
    folder = PurePosixPath(path).parent.as_posix().replace("/", ".")
    return f"vistoken.{folder}" if folder in FOLDERS else folder


def fault_of(found: Import, path: str, names: frozenset[str]) -> str | None:
    """Why the file may not import this, or None."""
    room = ROOMS[room_of(path)]
    if found.head in FOLDERS:
        return f"top-level {found.head!r} is another package: import vistoken.{found.head}"
    if found.target == "vistoken.eval" and found.binds == "eval":
        return "hides the builtin eval: write `import vistoken.eval`"
    if found.head != "vistoken":
        allowed = room.eager if found.eager else room.lazy
        if allowed is ANY or found.head in allowed or found.head in sys.stdlib_module_names:
            return None
        return f"{found.head} {'at module level' if found.eager else 'even in a function'}"
    triton_code = any(is_triton(part) for part in found.target.split("."))
    if room_of(path) == "kernels" and found.eager and triton_code:
        return "triton code is imported inside the function that dispatches to it"
    if room.public_only and any(part[0] == "_" for part in found.target.split(".")[1:]):
        return None if found.target == "vistoken.__version__" else "a private name"
    if room.public_only and found.target in {"vistoken", *(f"vistoken.{name}" for name in names)}:
        return None
    if not found.within(*room.own) or found.within(*room.not_own):
        return f"{found.target} is not for {room_of(path)}"
    return None


def faults(path: str, source: str, names: frozenset[str]) -> list[str]:
    """Every forbidden import of a file, as `path:line: why`."""
    found = imports_of(source, package_of(path))
    whys = [(item.line, fault_of(item, path, names)) for item in found]
    return [f"{path}:{line}: {why}" for line, why in whys if why]


@cache
def public_names() -> frozenset[str]:
    """What users find in `vistoken` itself: its functions and classes, and every method's class."""
    methods = {method_class(name).__name__ for name in method_names()}
    return frozenset({*vistoken.__all__, *methods})


@pytest.mark.parametrize("path", python_files())
def test_imports(path: str) -> None:
    assert not faults(path, (ROOT / path).read_text(encoding="utf-8"), public_names())


LAZY = "def f():\n    "
BAD = [
    ("kernels/a.py", "import transformers", "transformers at module level"),
    ("kernels/a.py", LAZY + "import numpy", "numpy even in a function"),
    ("kernels/a.py", "import triton.language as tl", "triton at module level"),
    ("kernels/a.py", "from .a_triton import run", "inside the function"),
    ("kernels/a.py", "from vistoken.kernels import a_triton", "inside the function"),
    ("kernels/a.py", "from vistoken.kernels.hopper_a import run", "inside the function"),
    ("kernels/a.py", "from vistoken.kernels.triton_a import run", "inside the function"),
    ("kernels/a.py", "import vistoken", "not for kernels"),
    ("kernels/a.py", "from vistoken.method import Method", "not for kernels"),
    ("kernels/a_triton.py", "import vistoken.pruning.holov", "not for kernels, triton"),
    ("kernels/a_triton.py", "import numpy", "numpy at module level"),
    ("vistoken/kernels.py", "from vistoken.method import Method", "not for door"),
    ("vistoken/a.py", "from transformers import LlamaModel", "transformers at module level"),
    ("vistoken/a.py", "if True:\n    import PIL.Image", "PIL at module level"),
    ("vistoken/a.py", "class A:\n    import timm", "timm at module level"),
    ("vistoken/a.py", "try:\n    import diffusers\nexcept ImportError: pass", "diffusers at"),
    ("vistoken/a.py", LAZY + "from vistoken.adapters import llava", "not for core"),
    ("vistoken/a.py", LAZY + "from . import adapters", "not for core"),
    ("vistoken/a.py", LAZY + "import_module('vistoken.adapters.llava')", "not for core"),
    ("vistoken/a.py", LAZY + "importlib.import_module(f'vistoken.eval.{x}')", "not for core"),
    ("vistoken/a.py", "import vistoken.commands.main", "not for core"),
    ("vistoken/registry.py", LAZY + "import vistoken.eval", "not for registry"),
    ("vistoken/pruning/a.py", LAZY + "import transformers", "transformers even in a function"),
    ("vistoken/pruning/a.py", "from ..adapters import llava", "not for method"),
    ("adapters/a.py", "import transformers", "transformers at module level"),
    ("adapters/a.py", LAZY + "import vistoken.eval.scenes", "not for adapters"),
    ("eval/a.py", "from vistoken.attachment import Attachment", "not for eval"),
    ("eval/a.py", "from vistoken.adapters import llava", "not for eval"),
    ("eval/a.py", "from vistoken import registry", "not for eval"),
    ("eval/a.py", "from vistoken import _folders", "private"),
    ("eval/a.py", LAZY + "vistoken.registry.recognise(model)", "not for eval"),
    ("vistoken/a.py", LAZY + "return vistoken.eval.scenes", "not for core"),
    ("eval/a.py", "from vistoken.pruning.holov import _crops", "private"),
    ("eval/a.py", "import matplotlib", "matplotlib at module level"),
    ("vistoken/commands/a.py", "import vistoken.registry", "not for commands"),
    ("vistoken/commands/a.py", "import PIL", "PIL at module level"),
    ("examples/a.py", "from vistoken.edits import Edits", "not for examples"),
    ("tests/test_a.py", "import kernels.merge", "top-level 'kernels'"),
    ("tests/test_a.py", "from adapters import llava", "top-level 'adapters'"),
    ("eval/a.py", LAZY + "from vistoken import eval", "hides the builtin"),
]
GOOD = [
    ("kernels/a.py", "import math\nimport torch\nfrom vistoken.errors import BackendUnavailable"),
    ("kernels/a.py", LAZY + "from vistoken.kernels import a_triton"),
    ("kernels/a_triton.py", "import triton\nimport triton.language as tl\nfrom .b_triton import f"),
    ("vistoken/kernels.py", "from vistoken._folders import f\nfrom vistoken.kernels.a import g"),
    ("vistoken/a.py", "import torch.nn\nfrom .edits import Edits\n" + LAZY + "import PIL"),
    ("vistoken/a.py", "if TYPE_CHECKING:\n    from transformers import PreTrainedModel"),
    ("vistoken/registry.py", LAZY + "importlib.import_module(f'vistoken.adapters.{name}')"),
    ("vistoken/pruning/a.py", "from ..method import Method\nfrom vistoken.kernels import gather"),
    ("adapters/a.py", "from vistoken.host import Host\n" + LAZY + "import transformers"),
    ("eval/a.py", "import vistoken.eval\nfrom vistoken import __version__, attach\nimport rich"),
    ("eval/a.py", "import vistoken\nvistoken.attach(vistoken.eval.scenes.draw())"),
    ("eval/a.py", "from vistoken.pruning import holov\n" + LAZY + "import numpy as np"),
    ("vistoken/commands/a.py", "import typer\nfrom vistoken.eval.scenes import draw"),
    ("examples/a.py", "import numpy\nimport vistoken"),
    ("tests/test_a.py", "import numpy\nfrom vistoken.edits import Edits"),
]


@pytest.mark.parametrize(("path", "source", "why"), BAD)
def test_the_rules_refuse(path: str, source: str, why: str) -> None:
    (fault,) = faults(path, source, frozenset({"attach"}))
    assert why in fault


@pytest.mark.parametrize(("path", "source"), GOOD)
def test_the_rules_allow(path: str, source: str) -> None:
    assert faults(path, source, frozenset({"attach"})) == []


# --- the folders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_flat_and_no_package(folder: str) -> None:
    """A package `kernels` at the root would hide the one that transformers looks for."""
    subfolders = {path.name for path in (ROOT / folder).iterdir() if path.is_dir()}
    assert not (ROOT / folder / "__init__.py").exists()
    assert subfolders - {"__pycache__"} <= ({"results"} if folder == "eval" else set())


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_holds_modules(folder: str) -> None:
    """An empty folder is no part of a git clone, and its front door would open on nothing."""
    assert list((ROOT / folder).glob("*.py"))


def test_results_are_data() -> None:
    results = ROOT / "eval" / "results"
    assert not [path.name for path in results.rglob("*.py")]


def test_no_conftest_at_the_root() -> None:
    """It would put the repository root, and so the folder `kernels`, on every test's path."""
    assert not (ROOT / "conftest.py").exists()


@pytest.mark.parametrize("path", python_files())
def test_file_is_short(path: str) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{path} has {lines} lines: split it (at most {MAX_LINES})"
