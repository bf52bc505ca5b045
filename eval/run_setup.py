"""Setting up an evaluation: the model and its identity, the prompt it wants."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import vistoken
from vistoken.errors import AttachError, BackendUnavailable, DataError

SHIPPED = "shipped"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_SAMPLES = 256


def load(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Return (model, processor) of a local checkpoint folder, or the shipped model by name.

    `auto` takes a GPU where there is one, and float32 on a CPU. Raises `DataError` for what is no
    checkpoint folder, `BackendUnavailable` for a device or package that is not there.
    """
    if dtype not in DTYPES:
        raise DataError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    where = _device(device)
    with _without_bars():
        return _load(name, where, dtype)


def _load(name: str, where: torch.device, dtype: str) -> tuple[Any, Any]:
    cpu = where.type != "cuda"
    wanted: torch.dtype | None = getattr(torch, dtype) if dtype != "auto" else None
    if name == SHIPPED or name in vistoken.list_shipped():
        shipped = vistoken.list_shipped()[0] if name == SHIPPED else name
        return vistoken.load_shipped(shipped, dtype=wanted or torch.float32, device=where)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise DataError(
            f"{name!r} is no checkpoint folder (it has no config.json); give a local folder, or "
            f"{SHIPPED!r} for the model in the package"
        )
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise BackendUnavailable(
            "reading a checkpoint needs transformers: pip install 'vistoken[vlm]'"
        ) from error
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=wanted or (torch.float32 if cpu else "auto"), local_files_only=True
        )
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{folder} cannot be loaded: {told[0]}") from error
    return model.to(where).eval(), processor


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from showing progress bars of its own, where it is installed."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendUnavailable(f"there is no device {name!r}; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"PyTorch finds no GPU for {name!r}; use cpu")
    return device


def fingerprint(model: Any) -> str:
    """Return a SHA-256 over a model's class, its config and 256 values of each of its tensors."""
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
    text = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    code = hashlib.sha256(text.encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", torch.float64)
        code.update(f"{name} {tuple(tensor.shape)}".encode())
        code.update(some.numpy().tobytes())
    return code.hexdigest()


def prompt_writer(processor: Any, template: str | None = None) -> Callable[[str], str]:
    """Return the function that puts a question into the model's prompt.

    That is the processor's chat template, or `template`, which holds the model's image placeholder
    and `{question}`. Raises `DataError` if the prompt would not hold the placeholder once.
    """
    place = processor.image_token

    def write(question: str) -> str:
        if template is not None:
            return template.replace("{question}", question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    if template is None and not getattr(processor, "chat_template", None):
        raise DataError(
            "the checkpoint has no chat template: give the prompt as --template, such as "
            f"'USER: {place}\\n{{question}} ASSISTANT:'"
        )
    trial = write("is it?")
    if trial.count(place) != 1 or "is it?" not in trial:
        raise DataError(f"a prompt must hold {place} once and the question, got {trial!r}")
    return write


def check_bare(model: Any) -> None:
    """Raise `AttachError` if something is attached already: the bare model would not be bare."""
    held = vistoken.attachments(model)
    if held:
        names = ", ".join(str(method) for attached in held for method in attached.methods)
        raise AttachError(f"the model has {names} attached: detach it before the evaluation")
