"""Collecting the answers of an evaluation: what is known, what is missing, who answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vistoken.eval.run_model import Configuration, Reader
from vistoken.eval.run_setup import fingerprint
from vistoken.eval.run_store import Header, Store
from vistoken.eval.run_workers import Workers
from vistoken.eval.tasks import Plan


def open_stores(
    model: Any,
    plan: Plan,
    configurations: Sequence[Configuration],
    units: Sequence[Sequence[Sequence[int]]],
    batch: int,
    folder: Path | None,
    workers: Workers,
) -> list[Store]:
    """Open the answers of every configuration; the first process reads for all."""
    sizes = [sum(len(asks) for asks in unit) for unit in units]
    identity: dict[str, Any] = {
        "model": fingerprint(model),
        "items": plan.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "unit": batch,
    }
    stores = [
        Store(
            Header(configuration.label, configuration.recipe, **identity),
            sizes,
            None if folder is None else folder / "answers",
        )
        for configuration in configurations
    ]
    if workers.first:
        for store in stores:
            store.read()
    for store, units_read in zip(stores, workers.share([s.units for s in stores]), strict=True):
        store.units = units_read
    return stores


def collect(
    model: Any,
    processor: Any,
    plan: Plan,
    configurations: Sequence[Configuration],
    units: Sequence[Sequence[Sequence[int]]],
    stores: Sequence[Store],
    workers: Workers,
    watch: Callable[[int], object],
) -> None:
    """Answer what is missing, unit by unit and all configurations of a unit in turn.

    Taking turns spreads a slow minute of the machine over all configurations alike.
    """
    todo = sorted({number for store in stores for number in store.missing})
    new = []
    for number in todo[workers.index :: workers.count]:
        reader = Reader(model, processor, plan, units[number])
        for place, (configuration, store) in enumerate(zip(configurations, stores, strict=True)):
            if number not in store.units:
                unit = reader.answer(configuration)
                store.add(number, unit, workers.index)
                new.append((place, number, unit))
                watch(len(unit.answers))
    for place, number, unit in workers.gather(new):
        stores[place].units[number] = unit


def in_order(plan: Plan, units: Sequence[Sequence[Sequence[int]]], store: Store) -> list[str]:
    """Return the answers of a configuration in the order of the plan's asks."""
    answers = [""] * len(plan.asks)
    for number, unit in enumerate(units):
        asks = [i for row in unit for i in row]
        for i, text in zip(asks, store.units[number].answers, strict=True):
            answers[i] = text
    return answers
