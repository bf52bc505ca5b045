"""Finds methods and hosts by file name; outside packages join through entry points."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from vistoken.errors import DataError, MethodError, ModelNotSupported
from vistoken.host import Host
from vistoken.method import Method, nearest

FAMILIES = {"pruning": "vistoken.pruning"}


@dataclass(frozen=True)
class MethodInfo:
    """One row of `list_methods`."""

    name: str
    family: str
    paper: str
    tag: str
    hosts: tuple[str, ...]


def _classes(module: ModuleType, base: type) -> Iterator[type]:
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, base)
            and value.__module__ == module.__name__
        ):
            yield value


def _files(package: str) -> list[str]:
    """Public module names in the package, found again at each call so that a new file counts."""
    path = importlib.import_module(package).__path__
    return sorted(found.name for found in pkgutil.iter_modules(path) if found.name[0] != "_")


@cache
def _outside(group: str) -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=group)}


def method_names(family: str | None = None) -> list[str]:
    """Names of all methods, or of one family."""
    if family is not None and family not in FAMILIES:
        raise MethodError(
            f"There is no method family {family!r}.{nearest(family, list(FAMILIES))} "
            f"Families: {', '.join(FAMILIES)}."
        )
    names = [
        name
        for key, package in FAMILIES.items()
        if family in (None, key)
        for name in _files(package)
    ]
    outside = _outside("vistoken.methods")
    return names + [n for n in outside if family is None or method_class(n).family == family]


def method_class(name: str) -> type[Method]:
    """Return the class of the method called `name`; unknown names are refused with the nearest."""
    for package in FAMILIES.values():
        if name in _files(package):
            module = importlib.import_module(f"{package}.{name}")
            found = [cls for cls in _classes(module, Method) if getattr(cls, "name", None) == name]
            if len(found) != 1:
                raise MethodError(f"{module.__name__} must define one Method named {name!r}.")
            return found[0]
    if name in _outside("vistoken.methods"):
        return _outside("vistoken.methods")[name].load()
    known = [n for package in FAMILIES.values() for n in _files(package)]
    known += list(_outside("vistoken.methods"))
    raise MethodError(
        f"There is no method {name!r}.{nearest(str(name), known)} Methods: {', '.join(known)}."
    )


def host_classes() -> list[type[Host]]:
    """Return every host class: the files of `adapters/`, then those of outside packages.

    Files whose names begin with `vlm` hold what hosts share; a host imports them when it is used.
    """
    hosts: list[type[Host]] = []
    for name in _files("vistoken.adapters"):
        if name.startswith("vlm"):
            continue
        module = importlib.import_module(f"vistoken.adapters.{name}")
        hosts += [cls for cls in _classes(module, Host) if getattr(cls, "classes", ())]
    return hosts + [point.load() for point in _outside("vistoken.hosts").values()]


def recognise(model: nn.Module) -> Host:
    """Return the host of `model`, or raise `ModelNotSupported` with what is supported."""
    hosts = host_classes()
    for host in hosts:
        if host.recognises(model):
            return host(model)
    known = "; ".join(f"{host.title}: {', '.join(host.classes)}" for host in hosts)
    looked = " < ".join(cls.__name__ for cls in type(model).__mro__ if cls is not object)
    raise ModelNotSupported(
        f"No host knows {type(model).__name__} (looked for these class names: {looked}). "
        f"Supported models: {known}."
    )


def list_methods(family: str | None = None) -> list[MethodInfo]:
    """Return a row for every method (of `family`): name, family, paper, tag, hosts it can join."""
    rows = []
    for name in method_names(family):
        cls = method_class(name)
        hosts = tuple(h.name for h in host_classes() if not h.missing(cls.places, cls.signals))
        rows.append(MethodInfo(name, cls.family, cls.paper, cls.tag, hosts))
    return rows


def method_from_dict(recipe: Any) -> Method:
    """Build a method from its recipe, `{"name": ..., option: value, ...}`."""
    if not isinstance(recipe, dict) or not isinstance(recipe.get("name"), str):
        raise MethodError(f'A recipe is a mapping with a "name", got {recipe!r}.')
    given = {key: value for key, value in recipe.items() if key != "name"}
    return method_class(recipe["name"]).from_options(given)


def load_recipe(path: str | Path) -> list[Method]:
    """Read the methods that `Attachment.save` wrote to a JSON file."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no recipe file {str(path)!r}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("methods"), list):
        raise DataError(f'{path} is not a recipe: it needs a list "methods".')
    return [method_from_dict(recipe) for recipe in content["methods"]]
