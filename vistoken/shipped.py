"""The trained models that come inside the package: no download, no network."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from vistoken.errors import MethodError, VistokenError

_FOLDER = Path(__file__).with_name("shipped_models")


def list_shipped() -> list[str]:
    """Return the names that `load_shipped` takes."""
    return sorted(p.parent.name for p in _FOLDER.glob("*/config.json"))


def load_shipped(
    name: str = "tiny-llava",
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> tuple[Any, Any]:
    """Load a model that ships with vistoken: (model in evaluation mode, its processor).

    `tiny-llava` is a stock `LlavaForConditionalGeneration` (336 x 336 pixels, 576 visual tokens)
    trained on the pictures of `vistoken.eval.scenes`; its README.md is the model card. Weights are
    stored in bfloat16 and converted to `dtype`. Raises MethodError for an unknown name and
    VistokenError where transformers is not installed.
    """
    known = list_shipped()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise MethodError(f"no shipped model {name!r}; there is: {', '.join(known)}.{hint}")
    missing = [p for p in ("transformers", "PIL") if importlib.util.find_spec(p) is None]
    if missing:
        raise VistokenError(
            f"load_shipped({name!r}) needs {' and '.join(missing)}: pip install 'vistoken[vlm]'"
        )
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = _FOLDER / name
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, local_files_only=True
    )
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    return model.to(device).eval(), processor
