"""The journal of edits to a model, and its exact undo.

Three kinds of edit, each of which survives deepcopy and pickle and leaves the state_dict alone:
a torch hook that is an object of a module-level class, an attribute, and a class swap. The journal
holds modules and module-level objects only, so a deepcopy of the model carries an independent
journal of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from torch import nn
from torch.utils.hooks import RemovableHandle

from vistoken.errors import AttachError


class _Edit(Protocol):
    @property
    def target(self) -> tuple[object, ...]:
        """What was written; of several edits with one target only the newest still stands."""

    def check(self) -> None:
        """Raise `AttachError` when somebody else changed what this edit wrote."""

    def undo(self) -> None:
        """Put back exactly what was there."""


@dataclass
class _HookEdit:
    module: nn.Module
    handle: RemovableHandle

    @property
    def target(self) -> tuple[object, ...]:
        return ("hook", self.handle.id)

    def check(self) -> None:
        hooks = self.handle.hooks_dict_ref()
        if hooks is None or self.handle.id not in hooks:
            raise AttachError(
                f"A hook of vistoken on {type(self.module).__name__} was removed by other code; "
                "undo that change first."
            )

    def undo(self) -> None:
        self.handle.remove()


class Missing:
    """Stands for an attribute that did not exist."""


@dataclass
class _AttributeEdit:
    owner: Any
    name: str
    before: Any
    written: Any

    @property
    def target(self) -> tuple[object, ...]:
        return ("attribute", id(self.owner), self.name)

    def check(self) -> None:
        if self.owner.__dict__.get(self.name, Missing) is not self.written:
            raise AttachError(
                f"{type(self.owner).__name__}.{self.name} was changed after vistoken set it; "
                "undo that change first."
            )

    def undo(self) -> None:
        if self.before is Missing:
            del self.owner.__dict__[self.name]
        else:
            self.owner.__dict__[self.name] = self.before


@dataclass
class _ClassEdit:
    module: nn.Module
    mixin: type

    @property
    def target(self) -> tuple[object, ...]:
        return ("class", id(self.module))

    def check(self) -> None:
        if type(self.module).__bases__[0] is not self.mixin:
            raise AttachError(
                f"The class of {type(self.module).__name__} was changed after vistoken changed it; "
                "undo that change first."
            )

    def undo(self) -> None:
        self.module.__class__ = type(self.module).__bases__[1]


class Mixed:
    """Base of the mixins that `Edits.mix_in` puts in front of a model's class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls, mixins = type(self), []
        while "_mixed_by_vistoken" in vars(cls):
            mixin, cls = cls.__bases__
            mixins.append(mixin)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (tuple(mixins), cls), state


def _rebuild(mixins: tuple[type, ...], bare: type) -> Any:
    cls: Any = bare
    for mixin in reversed(mixins):
        cls = _mixed(mixin, cls)
    return cls.__new__(cls)


@cache
def _mixed(mixin: Any, bare: Any) -> type:
    """The class `bare` with `mixin` in front, under the name of `bare`.

    The name and module stay, because libraries look models up by them; pickling goes through
    `Mixed.__reduce_ex__`, which names the parts instead.
    """
    namespace = {
        "__module__": bare.__module__,
        "__qualname__": bare.__qualname__,
        "__doc__": bare.__doc__,
        "_mixed_by_vistoken": True,
    }
    return type(bare.__name__, (mixin, bare), namespace)


class Edits:
    """Makes edits, remembers them, and undoes them last first."""

    def __init__(self) -> None:
        self._journal: list[_Edit] = []

    def __len__(self) -> int:
        return len(self._journal)

    def hook_before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs)` before each forward of `module`."""
        _refuse_compiled(module)
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        self._journal.append(_HookEdit(module, handle))

    def hook_after(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call `hook(module, args, kwargs, output)` after each forward of `module`."""
        _refuse_compiled(module)
        handle = module.register_forward_hook(hook, with_kwargs=True)
        self._journal.append(_HookEdit(module, handle))

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, an instance attribute that is neither parameter nor submodule."""
        before = owner.__dict__.get(name, Missing)
        owner.__dict__[name] = value
        self._journal.append(_AttributeEdit(owner, name, before, value))

    def mix_in(self, module: nn.Module, mixin: type[Mixed]) -> None:
        """Put `mixin` in front of the class of `module`.

        An instance attribute of the same name as one of the mixin's methods would hide it, so that
        is refused.
        """
        for name in vars(mixin):
            if not name.startswith("__") and name in module.__dict__:
                raise AttachError(
                    f"{type(module).__name__}.{name} was replaced on the instance by other code, "
                    "which would hide the edit; undo that first."
                )
        front: Any = mixin
        bare: Any = type(module)
        module.__class__ = _mixed(front, bare)
        self._journal.append(_ClassEdit(module, mixin))

    def check(self) -> None:
        """Raise `AttachError` unless every edit still stands as it was made."""
        newest = {edit.target: edit for edit in self._journal}
        for edit in newest.values():
            edit.check()

    def undo(self) -> None:
        """Undo every edit, last first."""
        while self._journal:
            self._journal.pop().undo()


def _refuse_compiled(module: nn.Module) -> None:
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise AttachError(
            f"{type(module).__name__} is compiled already, and a compiled module ignores new "
            "hooks; attach first, then compile."
        )
