"""Models, prompts and options as the command line names them; nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

import vistoken
from vistoken.errors import BackendUnavailable, DataError, MethodError, ModelNotSupported

SHIPPED = "shipped"
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendUnavailable(
            f"There is no device {name!r}; use auto, cpu, cuda or cuda:1."
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(f"PyTorch finds no GPU for {name!r}; use --device cpu.")
    return device


def load_model(name: str, device: str = "auto") -> tuple[Any, Any]:
    """Return (model, processor): the shipped model by name, or a local checkpoint folder.

    Raises `DataError` for what is no checkpoint folder, `ModelNotSupported` for a model that
    vistoken does not know, before its weights are read.
    """
    where = choose_device(device)
    with quiet():
        if name == SHIPPED or name in vistoken.list_shipped():
            shipped = vistoken.list_shipped()[0] if name == SHIPPED else name
            return vistoken.load_shipped(shipped, device=where)
        return _load_folder(Path(name), where)


def inspect_model(name: str) -> Any:
    """Return what vistoken sees in a model named as for `load_model`, without reading weights."""
    if name == SHIPPED or name in vistoken.list_shipped():
        return vistoken.inspect(load_model(name, "cpu")[0])
    with quiet():
        return vistoken.inspect(_build_empty(_read_config(Path(name))))


def _load_folder(folder: Path, device: torch.device) -> tuple[Any, Any]:
    config = _read_config(folder)
    vistoken.inspect(_build_empty(config))
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    unreadable = (UnpicklingError, SafetensorError)
    dtype = "auto" if device.type == "cuda" else torch.float32
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **_LOCAL
        )
        processor = AutoProcessor.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, RuntimeError, ImportError, *unreadable) as error:
        raise DataError(f"{folder} cannot be loaded: {_first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise DataError(
            f"The weights in {folder} lack {len(missing)} tensors of the model, such as "
            f"{missing[0]}: the checkpoint is incomplete."
        )
    return model.to(device).eval(), _complete(processor, config, folder)


def _read_config(folder: Path) -> Any:
    _check_folder(folder)
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise BackendUnavailable(
            "Reading a checkpoint needs transformers: pip install 'vistoken[vlm]'."
        ) from error
    try:
        return AutoConfig.from_pretrained(folder, **_LOCAL)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}/config.json cannot be used: {_first_line(error)}") from error


def _check_folder(folder: Path) -> None:
    choices = f"Give a local checkpoint folder, or {SHIPPED!r} for the model in the package."
    if not folder.exists():
        raise DataError(f"There is no folder {str(folder)!r}. {choices}")
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} is a file, not a checkpoint folder. {choices}")
    if not (folder / "config.json").is_file():
        raise DataError(f"{str(folder)!r} has no config.json, so it is no checkpoint. {choices}")


def _build_empty(config: Any) -> Any:
    """Build the model of a config without weights."""
    from transformers import AutoModel, AutoModelForImageTextToText

    for auto in (AutoModelForImageTextToText, AutoModel):
        try:
            with torch.device("meta"):
                return auto.from_config(config, trust_remote_code=False)
        except ValueError:  # not among the architectures of this Auto class
            continue
    raise ModelNotSupported(
        f"transformers has no model class for {config.model_type!r} checkpoints "
        f"({', '.join(config.architectures or ['no architecture named'])})."
    )


def _complete(processor: Any, config: Any, folder: Path) -> Any:
    """Fill in what processors saved by older versions of transformers leave out."""
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise DataError(
            f"{folder} has no full processor: both a tokenizer and a preprocessor_config.json (or "
            "processor_config.json) are needed."
        )
    if getattr(processor, "patch_size", 0) is None:
        processor.patch_size = config.vision_config.patch_size
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.num_additional_image_tokens = 1
    return processor


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from writing notices and progress bars, which the commands replace."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def complete_prompt(processor: Any, prompt: str) -> str:
    r"""Return `prompt` with the image placeholder once; `\n` in it stands for a line break.

    Without a placeholder the processor's chat template puts the picture before the text. Raises
    `DataError` for an empty prompt, several placeholders, or none and no chat template.
    """
    prompt, placeholder = prompt.replace("\\n", "\n"), processor.image_token
    if not prompt.strip():
        raise DataError("The prompt is empty.")
    count = prompt.count(placeholder)
    if count > 1:
        raise DataError(
            f"The prompt holds {placeholder} {count} times, but there is one image: write it once."
        )
    if count == 1:
        return prompt
    if not getattr(processor, "chat_template", None):
        raise DataError(
            f"The prompt has no image placeholder, and this checkpoint has no chat template to "
            f"place it: write {placeholder} where the picture belongs."
        )
    message = [{"type": "image"}, {"type": "text", "text": prompt}]
    made = processor.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
    )
    if made.count(placeholder) != 1:
        raise DataError(
            f"The checkpoint's chat template does not place the picture: write {placeholder} in "
            "the prompt, where the picture belongs."
        )
    return made


def read_method(
    name: str, ratio: float | None, keep: int | None, options: Sequence[str]
) -> vistoken.Method:
    """Build a pruning method from `--method`, `--ratio`, `--keep` and `--option key=value`."""
    method = vistoken.method_class(name)
    if method.family != "pruning":
        raise MethodError(
            f"{name} is a {method.family} method. "
            f"Pruning methods: {', '.join(vistoken.method_names('pruning'))}."
        )
    given: dict[str, Any] = {"ratio": ratio, "keep": keep}
    known = method.options()
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not key or not equals:
            raise MethodError(f"Options are written key=value, got {option!r}.")
        if given.get(key) is not None:
            raise MethodError(f"The option {key!r} is given twice.")
        default = known[key].default if key in known else ""
        given[key] = value if isinstance(default, str) else _value(value)
    return method.from_options(given)


def _value(text: str) -> Any:
    """A number, true, false or null as JSON writes them; anything else stays text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
