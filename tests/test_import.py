"""What `import vistoken` costs and needs, each time seen from a fresh process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "timm", "diffusers", "triton", "PIL", "typer", "rich", "matplotlib")


def run_python(code: str, cwd: Path = ROOT, **env: str) -> str:
    """Run code in a fresh interpreter, the working directory first on its path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=kept | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@cache
def loaded_by(statement: str) -> frozenset[str]:
    """Top-level names in `sys.modules` after the statement."""
    report = "import sys\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    return frozenset(run_python(f"{statement}\n{report}").splitlines()[-1].split())


LIGHT = {
    "package": "import vistoken",
    "front doors": "import vistoken.kernels, vistoken.adapters, vistoken.eval",
    "list of methods": "import vistoken; vistoken.list_methods()",
}


@pytest.mark.parametrize("statement", LIGHT.values(), ids=LIGHT.keys())
def test_loads_torch_and_nothing_heavier(statement: str) -> None:
    extra = loaded_by(statement) - loaded_by("import torch")
    assert {name for name in extra if name not in sys.stdlib_module_names} == {"vistoken"}
    assert not extra & set(HEAVY)


def test_the_probe_sees_what_is_loaded() -> None:
    assert {"torch", "PIL"} <= loaded_by("import torch, PIL.Image")


# --- with only the required dependencies installed -----------------------------------------------


def closure(*names: str) -> set[str]:
    """Distributions that these need, themselves included, in normalized spelling."""
    todo, done = list(names), set()
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in done:
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a dependency of another platform
        done.add(name)
        todo += [re.split(r"[^\w.-]", item)[0] for item in needs if "extra ==" not in item]
    return done


def modules_outside(*distributions: str) -> list[str]:
    """Importable top-level names of all installed distributions that these do not need."""
    allowed = closure(*distributions)
    owners = metadata.packages_distributions()
    normalized = {
        name: {re.sub(r"[-_.]+", "-", owner).lower() for owner in found}
        for name, found in owners.items()
    }
    return sorted(name for name, found in normalized.items() if not found & allowed)


BLOCKED_IMPORT = """
import importlib, json, pkgutil, sys
blocked = set(json.loads({blocked!r}))
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
import torch._dynamo  # asks for packages that it can do without
sys.meta_path.insert(0, Blocker())
import vistoken
def modules(package):
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        parts = set(found.name.rpartition(".")[2].split("_"))
        if found.name in {skipped!r} or parts & {{"triton", "hopper"}}:
            continue
        module = importlib.import_module(found.name)
        yield found.name
        if hasattr(module, "__path__"):
            yield from modules(module)
names = [name for name in vistoken.__all__ if getattr(vistoken, name) is not None]
print(*modules(vistoken))
"""
# Distributions installed (with what they need), and parts of vistoken that need more.
BARE = {
    "torch": ({"torch"}, {"vistoken.commands", "vistoken.eval"}),
    "required": ({"torch", "typer", "rich"}, {"vistoken.eval"}),
    "pictures": ({"torch", "typer", "rich", "numpy", "pillow"}, set()),
}


@pytest.mark.parametrize(("installed", "skipped"), BARE.values(), ids=BARE.keys())
def test_every_module_imports_without_the_extras(installed: set[str], skipped: set[str]) -> None:
    """Optional packages are imported by the functions that use them; triton is never needed."""
    blocked = sorted({*modules_outside(*installed), "triton"} - {"vistoken", "_distutils_hack"})
    assert {"transformers", "matplotlib"} <= set(blocked)
    assert ("PIL" in blocked) == ("pillow" not in installed)
    code = BLOCKED_IMPORT.format(blocked=json.dumps(blocked), skipped=skipped)
    imported = set(run_python(code).splitlines()[-1].split())
    files = [*(ROOT / "vistoken").glob("*.py"), *(ROOT / "kernels").glob("*.py")]
    triton_code = {"triton", "hopper"}
    expected = {path.stem for path in files if not triton_code & set(path.stem.split("_"))}
    expected -= {"__init__"}
    left_out = {name.rpartition(".")[2] for name in skipped}
    assert expected - left_out <= {name.rpartition(".")[2] for name in imported}


# --- the folders at the repository root stand in nobody's way ------------------------------------

AVAILABLE = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
FROM_ROOT = """
import importlib.util
import vistoken.kernels, vistoken.adapters, vistoken.eval
specs = [importlib.util.find_spec(name) for name in ("kernels", "adapters", "eval")]
print(*[spec.origin for spec in specs if spec and spec.origin], sep="\\n")
from transformers import LlamaForCausalLM
"""


def test_folders_do_not_shadow_other_packages(tmp_path: Path) -> None:
    """In the repository root, transformers works and sees what it sees in an empty folder."""
    *origins, available = run_python(FROM_ROOT + AVAILABLE).splitlines()
    assert available == run_python(AVAILABLE, tmp_path).strip()
    for origin in filter(None, origins):
        assert ROOT not in Path(origin).parents


def test_a_real_kernels_package_wins(tmp_path: Path) -> None:
    """With a package named `kernels` installed, the root's folder of that name yields to it."""
    real = tmp_path / "kernels" / "__init__.py"
    real.parent.mkdir()
    real.write_text("REAL = True\n")
    code = "import vistoken.kernels, kernels; print(kernels.REAL, vistoken.kernels.__path__[0])"
    real_one, ours = run_python(code, PYTHONPATH=str(tmp_path)).split(maxsplit=1)
    assert real_one == "True"
    assert Path(ours.strip()) == ROOT / "kernels"
