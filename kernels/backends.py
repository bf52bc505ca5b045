"""Which backend an operation runs on that has a plain torch reference and a Triton kernel."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

from vistoken.errors import BackendUnavailable

BACKENDS = ("reference", "triton")


def choose_backend(name: str, backend: str | None, given: Tensor, largest: int, what: str) -> str:
    """Return `reference` or `triton` for the operation `name` on `given` [..., N].

    An explicit `backend` never falls back: it raises `BackendUnavailable`, with the reason, where
    it cannot run. By default CUDA tensors of up to `largest` entries, called `what`, take `triton`
    where it is installed.
    """
    if backend not in (None, *BACKENDS):
        raise BackendUnavailable(f"{name} has the backends {BACKENDS}, got {backend!r}.")
    if backend == "reference" or (backend is None and not given.is_cuda):
        return "reference"
    reason = _why_not_triton(given, largest, what)
    if reason is None:
        return "triton"
    if backend is None:
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
