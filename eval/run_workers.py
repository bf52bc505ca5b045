"""The processes of an evaluation: who does what, and how the answers come together.

`accelerate launch --num_processes N -m vistoken.eval.run ...` (on a machine without GPU:
`accelerate launch --multi_gpu --num_processes N ...`, or torchrun) starts N processes; each holds
a whole model, one per GPU. A single process needs none of this.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from vistoken.errors import BackendUnavailable

# The slowest process may need that much longer than the fastest.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Workers:
    """This process is number `index` of `count`; `device` is its own, None if it may choose."""

    index: int = 0
    count: int = 1
    device: str | None = None

    @property
    def first(self) -> bool:
        """Whether this process reads, writes and prints for all."""
        return self.index == 0

    def share(self, value: Any) -> Any:
        """Return the value that the first process gave, on every process."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes, on every process."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)


def find_workers(device: str = "auto") -> Workers:
    """Return the place of this process among those that a launcher started.

    Without a launcher it is the only one. Raises `BackendUnavailable` without accelerate.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Workers()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise BackendUnavailable(
            "several processes need accelerate: pip install 'vistoken[eval]'"
        ) from error
    cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    place = "cpu" if cpu else str(state.device)
    return Workers(state.process_index, state.num_processes, place)


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launched() -> bool:
    """Whether a launcher started this process, one of several or not."""
    return "WORLD_SIZE" in os.environ


def spawn(run: Callable[..., Any], arguments: Mapping[str, Any], count: int) -> int:
    """Call `run(**arguments)` in `count` new processes of this machine, on the CPU.

    The processes share the cores. Returns the exit status: that of the first one that fails, and 0
    if none does. `run` must be importable and ends with `SystemExit` to give a status.
    """
    from torch.multiprocessing import ProcessExitedException, start_processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or str(max(1, cores() // count))
    try:
        start_processes(_spawned, (run, dict(arguments), count, port), count, start_method="spawn")
    except ProcessExitedException as error:
        return error.exit_code
    finally:
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
    return 0


def _spawned(
    index: int, run: Callable[..., Any], arguments: dict[str, Any], count: int, port: int
) -> None:
    place = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run(**arguments)


def leave(workers: Workers) -> None:
    """End what `find_workers` began."""
    if workers.count > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
