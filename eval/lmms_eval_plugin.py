"""The lmms-eval plug-in: its benchmarks, run by its own adapters, on a model with a recipe in it.

    python -m lmms_eval --model vistoken_llava --tasks pope --batch_size 1 \\
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=holov,keep=64

`vistoken_llava` is lmms-eval's `llava_hf`. Beside the arguments of that, `--model_args` takes
`method=NAME` with the method's options, or `recipe=FILE` as written by `Attachment.save`;
`method=none` runs the bare model under the same prompts. A run fails where the stock adapter would
go on: at an exception in a call (which it scores as an empty answer), at an empty answer (unless
`allow_empty=true`), and when the attached methods have seen no picture. lmms-eval's command line
prints such a failure and writes no scores; with `--verbosity DEBUG` its exit status is 1 as well.

lmms-eval's response cache (`--use_cache`) tells runs apart by their arguments, not by the content
of a recipe file: give a changed recipe a new file name.

Importing this module, and resolving the manifests, loads no model library and no lmms-eval adapter.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import vistoken
from vistoken.errors import BackendUnavailable, MethodError, VistokenError

if TYPE_CHECKING:
    from vistoken import Attachment, Method, Report

# Name of a class of this module -> the adapter that it extends: module and class in lmms-eval.
ADAPTERS = {
    "LlavaSimple": ("lmms_eval.models.simple.llava_hf", "LlavaHf"),
    "LlavaChat": ("lmms_eval.models.chat.llava_hf", "LlavaHf"),
}
# Model id -> its classes. lmms-eval chooses prompt variants by model id, and has none for this one.
MODELS = {"vistoken_llava": {"simple": "LlavaSimple", "chat": "LlavaChat"}}
_INSTALL = "pip install 'vistoken[lmms]'"


class EvaluationFailed(VistokenError, RuntimeError):
    """A run whose score would not say what it claims to: a call failed or was not edited."""


def manifests() -> list[Any]:
    """Return the `ModelManifest` of every model id, for the entry-point group `lmms_eval.models`.

    Raises `BackendUnavailable` where lmms-eval is not installed.
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise BackendUnavailable(f"The plug-in needs lmms-eval >= 0.7: {_INSTALL}.") from error
    return [
        ModelManifest(
            model_id=model_id,
            **{f"{kind}_class_path": f"{__name__}.{name}" for kind, name in classes.items()},
        )
        for model_id, classes in MODELS.items()
    ]


def __getattr__(name: str) -> type:
    """Build an adapter class when lmms-eval asks for it."""
    if name not in ADAPTERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _adapter(name)


@cache
def _adapter(name: str) -> type:
    module, base = ADAPTERS[name]
    try:
        stock = getattr(importlib.import_module(module), base)
    except ImportError as error:
        raise BackendUnavailable(
            f"lmms-eval's adapter {module} cannot be imported ({error}): {_INSTALL}."
        ) from error
    return type(name, (RecipeAdapter, stock), {"__module__": __name__, "__doc__": stock.__doc__})


# --- what --model_args say -----------------------------------------------------------------------


def split_arguments(
    given: Mapping[str, Any], adapter: Iterable[str]
) -> tuple[tuple[Method, ...], dict[str, Any]]:
    """Split model arguments into the methods to attach and what goes on to the adapter.

    `adapter` names the arguments that the adapter takes. Raises `MethodError` for a recipe that is
    missing or given twice and for an argument that neither knows, `DataError` for a bad recipe
    file.
    """
    rest, taken = dict(given), list(adapter)
    recipe, name = rest.pop("recipe", None), rest.pop("method", None)
    if (recipe is None) == (name is None):
        raise MethodError(
            "Give exactly one of method=NAME (with its options, such as keep=64) and recipe=FILE "
            "in the model arguments; method=none runs the bare model."
        )
    if recipe is not None:
        _refuse_unknown(rest, taken)
        return tuple(vistoken.load_recipe(str(recipe))), rest
    if name == "none":
        _refuse_unknown(rest, taken)
        return (), rest
    method = vistoken.method_class(str(name))
    options = list(method.options())
    if both := sorted(set(options) & set(taken)):
        raise MethodError(
            f"{both[0]} is an option of {name} and an argument of the adapter: write the method to "
            "a file with Attachment.save and give recipe=FILE."
        )
    _refuse_unknown(rest, [*options, *taken])
    given_options = {key: rest.pop(key) for key in options if key in rest}
    return (method.from_options(given_options),), rest


def _refuse_unknown(given: Iterable[str], allowed: list[str]) -> None:
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise MethodError(
                f"There is no model argument {key!r}.{hint} Allowed here: {', '.join(allowed)}."
            )


# --- the adapter ---------------------------------------------------------------------------------


class RecipeAdapter:
    """Mixin before an lmms-eval adapter: attaches methods, and lets no failure become a score.

    `attachment` is None for the bare model and after lmms-eval has released the model; `tally`
    counts the calls of the last `generate_until`.
    """

    attachment: Attachment | None = None
    cache_hook: Any  # of the stock adapter

    def __init__(self, *, allow_empty: bool = False, **given: Any) -> None:
        stock = type(self).__mro__[2]
        taken = dict(inspect.signature(stock.__init__).parameters)  # type: ignore[misc]
        named = [name for name, p in taken.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        methods, rest = split_arguments(given, named[1:])
        # "" is the default of llava_hf, and means a replica per process if there are several; with
        # one process it reaches transformers, whose version 5 refuses it.
        if taken["device_map"].default == "" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            rest.setdefault("device_map", rest.get("device", taken["device"].default))
        super().__init__(**rest)
        self.allow_empty = allow_empty
        self.tally = Tally()
        if methods:  # the adapter has placed and wrapped the model: `model` is what it calls
            self.attachment = vistoken.attach(self.model, methods)  # type: ignore[attr-defined]

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Answer as the stock adapter does; raise `EvaluationFailed` where it would answer ""."""
        self.tally = Tally(self.attachment, self.allow_empty, self.cache_hook)
        self.cache_hook, hook = self.tally, self.cache_hook
        try:
            with raise_logged_errors():
                answers = super().generate_until(requests)  # type: ignore[misc]
        finally:
            self.cache_hook = hook
        for answer in answers:
            self.tally.check(answer)
        if requests and self.attachment is not None:
            self.tally.check_attached()
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Score as the stock adapter does; refused where the prompt is shorter than it believes."""
        if self.attachment and any(m.family == "pruning" for m in self.attachment.methods):
            raise EvaluationFailed(
                "loglikelihood tasks look up logits by their place in the unpruned prompt, so they "
                "do not work with a pruning method: use tasks of the type generate_until."
            )
        return super().loglikelihood(requests)  # type: ignore[misc]

    def clean(self) -> None:
        """Release the model, as lmms-eval does when all answers are there."""
        if self.attachment is not None:
            self.attachment.detach()
            self.attachment = self.tally.attachment = None
        super().clean()  # type: ignore[misc]


class Tally:
    """What one `generate_until` did, item by item; stands in the place of the adapter's cache hook.

    Adapters hand every answer to that hook as soon as they have it, so a bad one stops the run.
    """

    def __init__(
        self, attachment: Attachment | None = None, allow_empty: bool = False, hook: Any = None
    ) -> None:
        self.attachment, self.allow_empty, self.hook = attachment, allow_empty, hook
        self.items = self.images = self.tokens_in = self.tokens_out = 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Count an item, check its answer and pass it on."""
        self.items += 1
        self.check(answer)
        if self.attachment is not None:
            report = self._report(self.attachment)
            self.images += len(report.tokens_in)
            self.tokens_in += sum(report.tokens_in)
            self.tokens_out += sum(report.tokens_out)
        self.hook.add_partial(kind, request, answer)

    def check(self, answer: Any) -> None:
        """Raise `EvaluationFailed` for an empty answer, unless those are allowed."""
        text = getattr(answer, "text", answer)
        if not self.allow_empty and not str(text).strip():
            raise EvaluationFailed(
                "The model gave an empty answer. If it may do that on this task, add "
                "allow_empty=true to the model arguments; errors are still raised then."
            )

    def check_attached(self) -> None:
        """Raise `EvaluationFailed` unless the attached methods have seen a picture."""
        if self.attachment is None or self.images or self._report(self.attachment).tokens_in:
            return
        raise EvaluationFailed(
            f"{self.attachment} has seen no picture in {self.items} items, so the answers are "
            "those of the bare model: use a task with pictures, or method=none."
        )

    @staticmethod
    def _report(attachment: Attachment) -> Report:
        if all(held is not attachment for held in vistoken.attachments(attachment.model)):
            raise EvaluationFailed(f"{attachment} was taken off the model during the run.")
        try:
            return attachment.report()
        except VistokenError as error:
            raise EvaluationFailed(
                f"{attachment} has recorded no call of the model, so the answers are those of the "
                "bare model."
            ) from error

    def __str__(self) -> str:
        if not self.images:
            return f"{self.items} items"
        before, after = self.tokens_in / self.images, self.tokens_out / self.images
        return f"{self.items} items, visual tokens per picture {before:.1f} -> {after:.1f}"


@contextmanager
def raise_logged_errors() -> Iterator[None]:
    """Raise `EvaluationFailed` where lmms-eval logs an exception as an error and goes on."""
    from loguru import logger

    outer = sys.exc_info()[1]

    def stop(message: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and error is not outer:
            raise EvaluationFailed(f"A call of the model failed: {error}") from error

    handler = logger.add(stop, level="ERROR", catch=False)
    try:
        yield
    finally:
        logger.remove(handler)
