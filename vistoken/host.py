"""Hosts: what a file of `adapters/` provides for one model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from vistoken.contract import ModelFacts, Place, Signal, Stage
from vistoken.dominance import Masses
from vistoken.edits import Edits
from vistoken.errors import ModelNotSupported
from vistoken.method import Method
from vistoken.pictures import Picture
from vistoken.report import CallRecord, Ledger


class Host(ABC):
    """One model family: how to recognise it, read its signals and act at its places.

    A host is one file in `adapters/`. The class attributes are all that `list_methods` needs, so
    the file must not import a model library at module level. The constructor looks for every part
    it will use and raises `ModelNotSupported`, naming what is missing; it edits nothing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]  # class names looked for in the model's MRO
    signals: ClassVar[frozenset[Signal]]
    places: ClassVar[frozenset[Place]]

    model: Any  # a module whose attributes the host knows and the type checker does not
    facts: ModelFacts

    @abstractmethod
    def __init__(self, model: nn.Module) -> None: ...

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        """Whether `model` is of this family, judged by the class names in its MRO."""
        return any(base.__name__ in cls.classes for base in type(model).__mro__)

    @classmethod
    def missing(cls, places: Iterable[Place], signals: Iterable[Signal]) -> list[str]:
        """Names of the wanted places and signals that this host does not offer."""
        lacking = [place.value for place in places if place not in cls.places]
        return lacking + [signal.value for signal in signals if signal not in cls.signals]

    @abstractmethod
    def example(self) -> Picture:
        """A picture of the usual size, for estimates."""

    @abstractmethod
    def estimate(self, keep: int | None, text_tokens: int) -> CallRecord:
        """What a prefill of one such picture would cost, of which `keep` tokens enter the LLM."""

    @abstractmethod
    def install(
        self, method: Method, stages: tuple[Stage, ...], edits: Edits, ledger: Ledger
    ) -> None:
        """Put `method` into the model through `edits`; report every call to `ledger`."""

    def attention_masses(self, inputs: Mapping[str, Any], new_tokens: int) -> Masses:
        """What up to `new_tokens` greedily generated tokens attend to; leaves the model as it was.

        Raises `ModelNotSupported` for models that generate no text.
        """
        raise ModelNotSupported(
            f"{self.title} generates no text, so there is no text dominance to measure; use a "
            "vision-language model."
        )
