"""Which backend an operation runs on: what was asked for, what can run, and why not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vistoken.errors import BackendUnavailable

if TYPE_CHECKING:
    from vistoken.kernels.windows import Neighborhood, Window

# What attention over windows or block lists can run on; other operations have some of them.
BACKENDS = ("reference", "tiled", "flex", "triton", "natten")
VARIABLE = "VISTOKEN_BACKEND"
_SMALL = ("reference", "triton")  # what the operations that only choose or count tokens have

_in_use: ContextVar[str | None] = ContextVar("vistoken_backend", default=None)
# The same for compilers that cannot read a context variable: the uses of all threads, latest last.
_in_all_threads: list[str] = []
_COMPILER_READS_CONTEXT = torch.__version__ >= "2.14"


@dataclass(frozen=True)
class BackendRow:
    """Whether a backend runs a call; reason, why it cannot, is empty where it can."""

    backend: str
    runs: bool
    reason: str
    chosen: bool


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations called inside on one backend: `reference`, `tiled`, `flex`, `triton` or
    `natten`.

    An explicit `backend=` argument goes before it; it goes before the variable VISTOKEN_BACKEND.
    Attention that cannot run on the named backend raises `BackendUnavailable` with the reason; it
    never falls back. Operations that only have `reference` and `triton`, such as `pick_diverse`,
    choose for themselves under another name. Holds for this thread or task; nests. A compiled
    function is compiled again for another backend, but reads the variable once.
    """
    token = _in_use.set(_known(name, "use_backend"))
    _in_all_threads.append(name)
    try:
        yield
    finally:
        _in_all_threads.remove(name)
        _in_use.reset(token)


def asked_backend(backend: str | None) -> tuple[str | None, str]:
    """Return the backend asked for, or None, and by what: argument, `use_backend`, environment."""
    if backend is not None:
        return backend, "backend"
    if torch.compiler.is_compiling() and not _COMPILER_READS_CONTEXT:
        inside = _in_all_threads[-1] if _in_all_threads else None
    else:
        inside = _in_use.get()
    if inside is not None:
        return inside, "use_backend"
    named = os.environ.get(VARIABLE, "")
    return (_known(named, VARIABLE) if named else None), VARIABLE


def select_backend(
    operation: str,
    backend: str | None,
    why_not: Callable[[str], str | None],
    offered: Sequence[str],
    automatic: Sequence[str],
) -> str:
    """Return the backend that an attention operation runs on.

    backend: the caller's argument; why_not: the reason a backend cannot run these inputs, or None;
    offered: all that the operation has; automatic: those tried in turn where none was asked for.
    Raises `BackendUnavailable` with the reason where the one asked for cannot run, or where none of
    the automatic ones can.
    """
    asked, source = asked_backend(backend)
    if asked is None:
        reasons = []
        for name in automatic:
            reason = why_not(name)
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
        raise BackendUnavailable(f"{operation} has no backend here. {'; '.join(reasons)}.")
    if asked not in offered:
        raise BackendUnavailable(
            f"{operation} has the backends {_listed(offered)}, got {asked!r} from {source}."
        )
    reason = why_not(asked)
    if reason is not None:
        raise BackendUnavailable(
            f"{operation} cannot run on {asked}, which {source} asks for: {reason}."
        )
    return asked


def automatic_backends(device: torch.device) -> tuple[str, ...]:
    """Return the backends that attention tries in turn on a device when none is asked for."""
    return ("triton", "tiled") if device.type == "cuda" else ("tiled",)


def explain_backends(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    where: Neighborhood | Window,
    *,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    global_q: Tensor | None = None,
) -> tuple[BackendRow, ...]:
    """Return for every backend whether `grid_attention` of these inputs runs on it, and why not.

    The row that is `chosen` is what runs without a `backend` argument: what `use_backend` or
    VISTOKEN_BACKEND name, or else the automatic choice. None is where the named one cannot run.
    """
    from vistoken.kernels.grid_attention import why_not

    def reason(name: str) -> str | None:
        return why_not(name, q, k, v, where, extra_k=extra_k, extra_v=extra_v, global_q=global_q)

    return backend_rows(reason, BACKENDS, q.device)


def backend_rows(
    why_not: Callable[[str], str | None], offered: Sequence[str], device: torch.device
) -> tuple[BackendRow, ...]:
    """Return a row for every offered backend; `why_not` is as in `select_backend`."""
    reasons = {name: why_not(name) for name in offered}
    asked, _ = asked_backend(None)
    tried = automatic_backends(device) if asked is None else (asked,)
    chosen = next((name for name in tried if reasons.get(name, "not offered") is None), None)
    return tuple(
        BackendRow(name, reason is None, reason or "", name == chosen)
        for name, reason in reasons.items()
    )


def choose_backend(name: str, backend: str | None, given: Tensor, largest: int, what: str) -> str:
    """Return `reference` or `triton` for the operation `name` on `given` [..., N].

    A backend asked for never falls back: it raises `BackendUnavailable`, with the reason, where it
    cannot run. By default CUDA tensors of up to `largest` entries, called `what`, take `triton`
    where it is installed.
    """
    asked, source = asked_backend(backend)
    if asked not in (None, *_SMALL):
        if source == "backend":
            raise BackendUnavailable(f"{name} has the backends {_SMALL}, got {backend!r}.")
        asked = None
    if asked == "reference" or (asked is None and not given.is_cuda):
        return "reference"
    reason = _why_not_triton(given, largest, what)
    if reason is None:
        return "triton"
    if asked is None:
        return "reference"
    raise BackendUnavailable(f"{name} cannot run on triton: {reason}.")


def _why_not_triton(given: Tensor, largest: int, what: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not given.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the weights are on {given.device.type}, not on a CUDA device"
    if given.shape[-1] > largest:
        return f"there are {given.shape[-1]} {what}, at most {largest} fit one program"
    return None


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendUnavailable(f"{source} names one of {_listed(BACKENDS)}, got {name!r}.")
    return name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
