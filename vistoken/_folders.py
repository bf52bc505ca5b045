"""Joins the top-level folders kernels/, adapters/ and eval/ to the package, installed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_folder(door: dict[str, Any]) -> None:
    """Turn the module with namespace `door` into the package whose files lie in its folder.

    In a wheel the folder lies beside the module (`vistoken/kernels/`); in a checkout it is the
    top-level folder of the same name. The folders carry no `__init__.py`, because a regular
    package called `kernels` would hide the PyPI package that transformers looks for.
    """
    inside = Path(door["__file__"]).with_suffix("")
    beside = inside.parent.parent / inside.name
    door["__path__"] = [str(inside if any(inside.glob("*.py")) else beside)]
    door["__spec__"].submodule_search_locations = door["__path__"]
    door["__package__"] = door["__name__"]
