"""Result files: what was measured, on which machine, from which state of the source.

A result file is a JSON object:

    schema     1
    benchmark  the name of the program that wrote it
    machine    device, driver, python, versions, commit, dirty, date
    settings   what was asked for: model, dtype, batch sizes, ...
    rows       one object per thing measured
    checks     what was verified on the way, by name

Programs write them, tables are made from them, nobody edits them.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vistoken import __version__
from vistoken.errors import DataError

SCHEMA = 1
FOLDER = Path(__file__).resolve().parent / "results"
COMMIT_VARIABLE = "VISTOKEN_COMMIT"
_FIELDS: dict[str, type] = {
    "schema": int,
    "benchmark": str,
    "machine": dict,
    "settings": dict,
    "rows": list,
    "checks": dict,
}
_MACHINE = ("device", "driver", "python", "versions", "commit", "dirty", "date")


@dataclass(frozen=True)
class ResultFile:
    """The content of a result file; `rows` are plain dictionaries, made by the benchmark."""

    benchmark: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    checks: Mapping[str, Any]
    schema: int = SCHEMA

    def to_json(self) -> str:
        """Return the file's text; raises `DataError` for values that JSON does not know."""
        try:
            return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"the result of {self.benchmark} cannot be written: {error}") from error

    def write(self, path: str | Path) -> Path:
        """Write the file, making its folder; returns the path."""
        path = Path(path)
        text = self.to_json()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


def default_path(benchmark: str) -> Path:
    """Return where the result of a benchmark lies: `<benchmark>.json` in `eval/results/`."""
    return FOLDER / f"{benchmark}.json"


def load(path: str | Path, benchmark: str | None = None) -> ResultFile:
    """Read and validate a result file.

    Raises `DataError`, naming the file and what is wrong with it; `benchmark` is the name that it
    must carry.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        program = benchmark or path.stem
        raise DataError(
            f"there is no result file {path}; write it with `python -m vistoken.eval.{program}`"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a JSON result file: {error}") from error
    reason = _fault(content, benchmark)
    if reason:
        raise DataError(f"{path} is not a valid result file: {reason}")
    return ResultFile(**content)


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describe the machine and the source: device, driver, versions, git commit, date (UTC).

    The commit is what the variable VISTOKEN_COMMIT names (with "+dirty" behind a changed one), for
    machines to which the source alone was copied, else that of the git checkout, else None.
    `dirty` does not count changed result files.
    """
    device = torch.device(device)
    commit, dirty = _commit()
    return {
        "device": _device_name(device),
        "driver": _driver(device),
        "python": platform.python_version(),
        "versions": {
            "vistoken": __version__,
            "torch": torch.__version__,
            **{name: _version(name) for name in ("transformers", "triton")},
        },
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine_line(facts: Mapping[str, Any]) -> str:
    """Return `machine(...)` as one readable line."""
    driver = f" (driver {facts['driver']})" if facts["driver"] else ""
    versions = [f"{name} {value}" for name, value in facts["versions"].items() if value]
    state = "unknown commit"
    if facts["commit"]:
        state = f"commit {facts['commit'][:10]}{' with changes' if facts['dirty'] else ''}"
    words = [f"{facts['device']}{driver}", f"Python {facts['python']}", *versions, state]
    return ", ".join([*words, facts["date"][:10]])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def _driver(device: torch.device) -> str | None:
    """The NVIDIA driver's version, where `nvidia-smi` tells it."""
    tool = shutil.which("nvidia-smi")
    if device.type != "cuda" or tool is None:
        return None
    out = _output([tool, "--query-gpu=driver_version", "--format=csv,noheader"])
    return out.splitlines()[0].strip() if out else None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this source and whether files differ from it; (None, None) if unknown."""
    named = os.environ.get(COMMIT_VARIABLE)
    if named:
        return named.removesuffix("+dirty"), named.endswith("+dirty")
    root = Path(__file__).resolve().parents[1]
    git = shutil.which("git")
    if git is not None:
        found = _output([git, "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"])
        top, _, commit = (found or "").partition("\n")
        if commit and Path(top).resolve() == root:
            status = _output(
                [git, "-C", str(root), "status", "--porcelain", "--", ".", ":!eval/results"]
            )
            return commit.strip(), None if status is None else bool(status.strip())
    return None, None


def _output(command: list[str]) -> str | None:
    """What a program prints, or None if it fails or takes longer than 10 seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _fault(content: Any, benchmark: str | None) -> str | None:
    """Why this is not the content of a result file, or None."""
    if not isinstance(content, dict):
        return f"it must hold a JSON object, not {type(content).__name__}"
    wrong = [
        f"{name!r} must be {kind.__name__}"
        for name, kind in _FIELDS.items()
        if not isinstance(content.get(name), kind)
    ]
    unknown = sorted(set(content) - set(_FIELDS))
    if wrong or unknown:
        return "; ".join(wrong + [f"unknown field {name!r}" for name in unknown])
    if content["schema"] != SCHEMA:
        return f"its schema is {content['schema']}, this version reads {SCHEMA}"
    if benchmark is not None and content["benchmark"] != benchmark:
        return f"it was written by {content['benchmark']!r}, not by {benchmark!r}"
    missing = [name for name in _MACHINE if name not in content["machine"]]
    if missing:
        return f"'machine' lacks {', '.join(missing)}"
    lists = [row for row in content["rows"] if not isinstance(row, dict)]
    return f"'rows' must hold objects, found {lists[0]!r}" if lists else None
