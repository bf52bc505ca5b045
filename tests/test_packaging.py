"""The packages that a release is made of, and every way of installing them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

import vistoken

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "adapters", "eval")
PARTS = (
    *("vistoken", *FOLDERS, "tests", "examples"),
    *("pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    "Makefile",
)
pytestmark = pytest.mark.xdist_group("packaging")  # one process builds once, for all of these


def product_files() -> set[str]:
    """What an installation must hold: every file of the four folders, by its place there.

    Notes (*.md) beside the modules, and pictures among the results, stay in the repository.
    """
    found = {path: path.relative_to(ROOT) for path in (ROOT / "vistoken").rglob("*")}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            found[path] = Path("vistoken") / path.relative_to(ROOT)
    stay = (".md", ".png", ".pyc", ".keep")
    shipped = Path("vistoken/shipped_models")
    return {
        place.as_posix()
        for path, place in found.items()
        if path.is_file() and (shipped in place.parents or path.suffix not in stay)
    }


@dataclass(frozen=True)
class Release:
    """A copy of the repository, and what was built from it."""

    source: Path
    sdist: Path
    wheel: Path

    def wheel_names(self) -> set[str]:
        with zipfile.ZipFile(self.wheel) as archive:
            return {name for name in archive.namelist() if not name.endswith("/")}

    def wheel_text(self, name: str) -> str:
        with zipfile.ZipFile(self.wheel) as archive:
            (path,) = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
            return archive.read(path).decode()


def run(*command: str, cwd: Path, **env: str) -> str:
    """Run a command with a bare environment as to Python; return what it printed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=kept | env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """Build an sdist, and a wheel from that sdist, without network."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, ignore=ignored)
        elif path.exists():
            shutil.copy(path, source / name)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), cwd=source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Release(source, sdist, wheel)


def test_wheel_holds_the_product_and_nothing_else(release: Release) -> None:
    inside = {name for name in release.wheel_names() if ".dist-info/" not in name}
    assert sorted(inside ^ product_files()) == []


def test_wheel_installs_one_top_level_name(release: Release) -> None:
    tops = {name.split("/")[0] for name in release.wheel_names()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vistoken"}
    assert release.wheel_text("top_level.txt").split() == ["vistoken"]


def test_wheel_metadata(release: Release) -> None:
    meta = HeaderParser().parsestr(release.wheel_text("METADATA"))
    needed = [item for item in meta.get_all("Requires-Dist") or [] if "extra ==" not in item]
    assert meta["Version"] == vistoken.__version__
    assert meta["License-Expression"] == "Apache-2.0"
    assert meta["Requires-Python"] == ">=3.10"
    assert {re.split(r"\W", item)[0] for item in needed} == {"torch", "typer", "rich"}
    assert {"vlm", "vit", "dit", "eval", "viz", "natten", "lmms", "dev", "all"} == set(
        meta.get_all("Provides-Extra") or []
    )


def test_license_is_shipped(release: Release) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
    assert release.wheel_text("licenses/LICENSE") == text
    with tarfile.open(release.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "tests/conftest.py"} <= names


# --- every way of installing ---------------------------------------------------------------------

PROBE = """
import importlib, importlib.util, json, pkgutil, sys
from pathlib import Path
import vistoken, vistoken.kernels, vistoken.adapters, vistoken.eval
doors = {name: sys.modules["vistoken." + name] for name in ("kernels", "adapters", "eval")}
modules = {name: sorted(m.name for m in pkgutil.iter_modules(door.__path__))
           for name, door in doors.items()}
origins = [importlib.util.find_spec(f"vistoken.{door}.{name}").origin
           for door, names in modules.items() for name in names]
command, data = json.loads(sys.argv[1])
module, _, function = command.partition(":")
home = Path(vistoken.__file__).parents[1]
print(json.dumps({
    "origins": [vistoken.__file__, *origins],
    "modules": modules,
    "leaked": sorted({name.partition(".")[0] for name in sys.modules} & doors.keys()),
    "command": callable(getattr(importlib.import_module(module), function)),
    "missing": [path for path in data if not (home / path).exists()],
}))
"""
BUILD_EDITABLE = (
    "import sys; from setuptools import build_meta; "
    "build_meta.build_editable(sys.argv[1], {'editable_mode': sys.argv[2]})"
)


def probe(release: Release, where: Path, cwd: Path, first: str = "") -> dict[str, Any]:
    """Run the probe with `where` first on the path.

    Without `site` no other installation of vistoken is found, unless it is a plain one.
    """
    points = ConfigParser()
    points.read_string(release.wheel_text("entry_points.txt"))
    command = points["console_scripts"]["vistoken"]
    data = [path.relative_to(ROOT) for path in (ROOT / "vistoken/shipped_models").rglob("*")]
    argument = json.dumps([command, [path.as_posix() for path in data]])
    paths = (str(where), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    printed = run(
        *(sys.executable, "-S", "-c", first + PROBE, argument),
        cwd=cwd,
        PYTHONPATH=os.pathsep.join(paths),
    )
    return json.loads(printed.splitlines()[-1])


def check(seen: dict[str, Any], home: Path) -> None:
    """Every module of the folders is found inside the installation, under one name only."""
    assert seen["leaked"] == []
    for folder in FOLDERS:
        expected = sorted(path.stem for path in (ROOT / folder).glob("*.py"))
        assert expected and seen["modules"][folder] == expected
    for origin in seen["origins"]:
        assert Path(origin).resolve().is_relative_to(home.resolve())
    assert seen["command"] and seen["missing"] == []


def test_checkout_runs_without_an_installation(release: Release) -> None:
    check(probe(release, release.source, release.source), release.source)


def test_wheel_runs(release: Release, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(release.wheel) as archive:
        archive.extractall(site)
    check(probe(release, site, empty), site)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable_installation_runs(release: Release, tmp_path: Path, mode: str) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-c", BUILD_EDITABLE, str(tmp_path), mode, cwd=release.source)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        archive.extractall(site)
    first = f"import site\nsite.addsitedir({str(site)!r})\n"
    check(probe(release, site, empty, first), release.source)
