"""Methods: frozen dataclasses whose fields are their options, their recipe and their JSON."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vistoken.contract import ModelFacts, Place, Signal, Stage
from vistoken.errors import MethodError

TAGS = ("training-free", "lossless limit", "needs fine-tuning", "experimental", "control")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """Declare a field of a method with its allowed values.

    `minimum` and `maximum` are inclusive, `below` is exclusive. The type is that of `default`;
    an option whose default is None takes a number, or None.
    """
    limits = {"choices": choices, "minimum": minimum, "maximum": maximum, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, **limits})


def nearest(given: str, allowed: Sequence[str]) -> str:
    """Return ' Did you mean …?' with the closest allowed name, or nothing."""
    close = difflib.get_close_matches(given, allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _allowed(limits: Any) -> str:
    if limits.get("choices"):
        return "one of " + ", ".join(repr(choice) for choice in limits["choices"])
    words = [
        f"{word} {limits[key]:g}"
        for key, word in (("minimum", "at least"), ("maximum", "at most"), ("below", "below"))
        if limits.get(key) is not None
    ]
    return " and ".join(words) or "a finite number"


def _is_allowed(value: Any, default: Any, limits: Any) -> bool:
    if value is None:
        return default is None
    if limits.get("choices"):
        return value in limits["choices"] and isinstance(value, type(default))
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(default, int) and not isinstance(value, int):
        return False
    if not isinstance(value, (int, float)):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return not (
        (limits.get("minimum") is not None and value < limits["minimum"])
        or (limits.get("maximum") is not None and value > limits["maximum"])
        or (limits.get("below") is not None and value >= limits["below"])
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method: options with limits, what it reads, where it acts, its recipe.

    A subclass lives in the file of its name in `vistoken/pruning/`, `vistoken/grounding/` or
    `vistoken/attention/`, sets the class attributes, declares its fields with `option(...)`, and
    is found by that file name. `places` and `signals` say what the class may need at most; an
    instance says exactly what through `stages`.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    paper: ClassVar[str]
    tag: ClassVar[str]
    places: ClassVar[frozenset[Place]]
    signals: ClassVar[frozenset[Signal]] = frozenset()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_allowed(value, field.default, field.metadata):
                raise MethodError(
                    f"{self.name}: {field.name} must be {_allowed(field.metadata)}, got {value!r}."
                )

    def stages(self, facts: ModelFacts) -> tuple[Stage, ...]:
        """Where this instance acts in a model with these facts, and what it reads there.

        Raises `MethodError` for options that the model cannot satisfy (a layer it lacks, a budget
        it cannot meet).
        """
        raise NotImplementedError

    @classmethod
    def options(cls) -> dict[str, dataclasses.Field[Any]]:
        """The options by name."""
        return {field.name: field for field in dataclasses.fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe: the name and every option, ready for JSON."""
        return {"name": self.name, **dataclasses.asdict(self)}

    @classmethod
    def from_options(cls, given: dict[str, Any]) -> Method:
        """Build the method from options by name; an unknown one is refused with the nearest."""
        known = list(cls.options())
        for key in given:
            if key not in known:
                raise MethodError(
                    f"{cls.name} has no option {key!r}.{nearest(key, known)} "
                    f"Its options: {', '.join(known)}."
                )
        return cls(**given)

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(changed)})"
