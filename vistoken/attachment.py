"""attach, detach and the Attachment: the life of an edit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from vistoken import __version__, registry
from vistoken.contract import Place, Stage
from vistoken.edits import Edits
from vistoken.errors import AttachError, MethodError, VistokenError
from vistoken.host import Host
from vistoken.method import Method
from vistoken.report import Ledger, Report

_STACK = "_vistoken"


class Attachment:
    """Methods that are in a model, and the way to take them out again.

    Usable as a context manager. `model` is the module that was edited (inside PEFT, the base
    model); `methods` are the methods in the order they act.
    """

    def __init__(self, model: nn.Module, host: Host, methods: tuple[Method, ...]) -> None:
        self.model = model
        self.host = host
        self.methods = methods
        self.stages: dict[Stage, Method] = {}
        self._edits = Edits()
        self._ledger = Ledger()

    def report(self) -> Report:
        """Return tokens, FLOPs and KV bytes of the last call, dense and as it ran."""
        call = self._ledger.last
        if call is None:
            raise VistokenError("There is nothing to report yet: run the model once first.")
        return Report(call, self.host.facts)

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON; `vistoken.attach(model, path)` reads it back."""
        content = {"vistoken": __version__, "methods": [m.to_dict() for m in self.methods]}
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def detach(self) -> nn.Module:
        """Undo every edit bit for bit and return the model; a second call does nothing.

        Attachments nest: only the newest can be taken off, else `AttachError` names it.
        """
        stack = _stack(self.model)
        if not any(held is self for held in stack):
            return self.model
        if stack[-1] is not self:
            newest = ", ".join(str(method) for method in stack[-1].methods)
            raise AttachError(f"Detach the newer attachment first: {newest}.")
        self._edits.check()
        self._edits.undo()
        stack.pop()
        if not stack:
            del self.model.__dict__[_STACK]
        return self.model

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if any(a is self for a in _stack(self.model)) else "detached"
        methods = ", ".join(str(method) for method in self.methods)
        return f"<Attachment {state}: {methods} on {self.host.title}>"


def _stack(model: nn.Module) -> list[Attachment]:
    return model.__dict__.get(_STACK, [])


def core_model(model: Any) -> Any:
    """Return the module to edit: inside PEFT the base model, else the model itself."""
    given: Any = model
    if not isinstance(model, nn.Module):
        raise AttachError(f"Expected a torch.nn.Module, got {type(model).__name__}.")
    names = {cls.__name__ for cls in type(model).__mro__}
    if "OptimizedModule" in names:
        raise AttachError(
            "The model is wrapped by torch.compile, which ignores later hooks: attach to the model "
            "before compiling it (the original is model._orig_mod)."
        )
    if names & {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}:
        raise AttachError(
            f"The model is wrapped by {type(model).__name__}: attach to the model before wrapping "
            "it (the original is model.module)."
        )
    if "PeftModel" in names:
        return core_model(given.get_base_model())
    return model


def _as_methods(wanted: Any) -> tuple[Method, ...]:
    if isinstance(wanted, (str, Path)):
        return tuple(registry.load_recipe(wanted))
    methods = (wanted,) if isinstance(wanted, Method) else wanted
    if not isinstance(methods, Iterable):
        raise MethodError(
            f"Expected a method, a list of methods or a path to a recipe, got {wanted!r}."
        )
    methods = tuple(methods)
    for method in methods:
        if not isinstance(method, Method):
            raise MethodError(f"Expected a method such as vistoken.HoloV(keep=64), got {method!r}.")
    if not methods:
        raise MethodError("There is no method to attach: the list is empty.")
    return methods


def _plan(host: Host, method: Method, taken: dict[Stage, Method]) -> tuple[Stage, ...]:
    """The stages of `method`, checked against the host and against those already taken."""
    stages = method.stages(host.facts)
    places = list(dict.fromkeys(stage.place for stage in stages))
    signals = list(dict.fromkeys(signal for stage in stages for signal in sorted(stage.signals)))
    missing = host.missing(places, signals)
    if missing:
        raise AttachError(
            f"{method.name} needs {', '.join(missing)}, which {host.title} does not offer. "
            f"It offers the places {_values(host.places)} and the signals {_values(host.signals)}."
        )
    held: dict[Place, Method] = {stage.place: other for stage, other in taken.items()}
    for place in places:
        if place in held:
            raise AttachError(
                f"{method.name} acts at the place {place.value!r}, where {held[place].name} is "
                "attached already; detach that first."
            )
    return stages


def _values(names: Iterable[Any]) -> str:
    return ", ".join(sorted(name.value for name in names))


def attach(model: nn.Module, methods: Method | Iterable[Method] | str | Path) -> Attachment:
    """Edit `model` in place so that `methods` act in it, and return the way back.

    `methods` is one method, a list (they act in that order), or the path of a JSON recipe. The
    edit is atomic: if anything is refused, the model is as it was. Raises `ModelNotSupported`,
    `AttachError` or `MethodError`.
    """
    chosen = _as_methods(methods)
    core = core_model(model)
    host = registry.recognise(core)
    taken = {stage: m for held in _stack(core) for stage, m in held.stages.items()}
    attachment = Attachment(core, host, chosen)
    for method in chosen:
        planned = {stage: method for stage in _plan(host, method, taken)}
        attachment.stages.update(planned)
        taken.update(planned)
    try:
        for method in chosen:
            stages = tuple(s for s, owner in attachment.stages.items() if owner is method)
            host.install(method, stages, attachment._edits, attachment._ledger)
    except BaseException:
        attachment._edits.undo()
        raise
    core.__dict__.setdefault(_STACK, []).append(attachment)
    return attachment


def detach(model: nn.Module) -> nn.Module:
    """Take every attachment off `model`, newest first, and return it as it was."""
    core = core_model(model)
    for attachment in reversed(list(_stack(core))):
        attachment.detach()
    return model


def attachments(model: nn.Module) -> tuple[Attachment, ...]:
    """Return the attachments that are on `model`, oldest first."""
    return tuple(_stack(core_model(model)))
