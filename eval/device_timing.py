"""Times of single operations, with the device kept busy: what a kernel costs inside a model.

`timing.measure` gives the latency that a caller sees, launches included. Here calls are queued one
behind the other, each with its pair of events and with a cold L2 cache, so a time is that of the
device alone, as long as the host keeps ahead of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vistoken.eval.timing import Timing, synchronize

COLD_BYTES = 1 << 28  # written before every call: more than any L2 cache holds
MOST_WRITES = 400  # of them before the first call: the device's queue is not endless
WRITE_SPEED = 2e9  # bytes a millisecond, about: how long such a write keeps the device busy


def time_on_device(
    run: Callable[[], Any],
    device: torch.device,
    *,
    budget: float = 400.0,
    most: int = 30,
    least: int = 2,
) -> Timing:
    """Time `run()` as often as fits into `budget` milliseconds, but `least` to `most` times.

    Three calls go before: the first compiles and tunes, the others warm up and say how long one
    takes; two of a call that takes longer than a quarter of the budget.
    """
    run()
    began = time.perf_counter()
    one = _queue(run, device, 1, 0.0)[0]
    if one < budget / 4:
        began = time.perf_counter()
        one = min(one, *_queue(run, device, 1, 0.0))
    host = (time.perf_counter() - began) * 1000.0  # of one call, waiting included
    repeats = min(max(int(budget / max(one, 1e-3)), least), most)
    return Timing.of(_queue(run, device, repeats, host * repeats))


def _queue(run: Callable[[], Any], device: torch.device, repeats: int, host: float) -> list[float]:
    """Milliseconds of each of several calls that wait for nothing but each other.

    host: milliseconds that the host may take to queue them; the device writes until then.
    """
    if device.type != "cuda":
        return [_on_host(run) for _ in range(repeats)]
    cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    synchronize(device)
    for _ in range(min(4 + int(host * WRITE_SPEED / COLD_BYTES), MOST_WRITES)):
        cold.zero_()
    for before, after in events:
        cold.zero_()
        before.record()
        run()
        after.record()
    synchronize(device)
    return [before.elapsed_time(after) for before, after in events]


def _on_host(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1000.0
