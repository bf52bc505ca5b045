"""The harness of every benchmark: a result is checked before it is timed.

A timed function is called with one input at a time; the inputs rotate, so that no cache serves the
same data twice in a row. Every call starts on an idle device, so a time is the latency that one
caller sees, launches included. On CUDA the clock is a pair of events on the current stream, on the
CPU it is `time.perf_counter`.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from vistoken.errors import BackendUnavailable, DataError, VistokenError

Input = TypeVar("Input")
_SYNC_MESSAGE = "called a synchronizing CUDA operation"


class CheckFailed(VistokenError, RuntimeError):
    """A result is not what it must be, so no time is given for it."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds over `samples` calls: the median, the 20th and the 80th percentile."""

    median: float
    p20: float
    p80: float
    samples: int

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Timing:
        """Summarize single times; percentiles are interpolated linearly."""
        ordered = sorted(milliseconds)
        if not ordered:
            raise ValueError("a timing needs at least one sample")
        median, p20, p80 = (_quantile(ordered, share) for share in (0.5, 0.2, 0.8))
        return cls(median, p20, p80, len(ordered))

    def __str__(self) -> str:
        digits = 2 if self.median < 10 else 1
        return f"{self.median:.{digits}f} ({self.p20:.{digits}f}-{self.p80:.{digits}f})"


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


class LapClock:
    """Cuts one call into named laps that add up to the whole.

    `begin` ends the lap that runs and begins the named one; a name that comes again adds to its
    lap. On CUDA a mark is an event in the stream and costs the host nothing to wait for.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type not in ("cuda", "cpu"):
            raise BackendUnavailable(
                f"times are taken on cuda and cpu devices, got {self.device.type!r}"
            )
        self._marks: list[tuple[str, Any]] = []

    def begin(self, name: str) -> None:
        """End the current lap and begin the lap `name`."""
        self._marks.append((name, self._now()))

    def stop(self) -> dict[str, float]:
        """End the last lap, wait for the device, and return milliseconds by lap, in order."""
        self.begin("")
        synchronize(self.device)
        laps: dict[str, float] = {}
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            laps[name] = laps.get(name, 0.0) + self._between(start, end)
        self._marks.clear()
        return laps

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type == "cpu":
            return (end - start) * 1000.0
        return start.elapsed_time(end)


@dataclass(frozen=True)
class Laps:
    """The laps of all timed calls: milliseconds by name, one entry per call."""

    samples: dict[str, list[float]]

    def timing(self, *names: str) -> Timing:
        """Summarize the sum of the named laps of each call; without names, the whole call."""
        chosen = [self.samples[name] for name in names or self.samples]
        return Timing.of([sum(call) for call in zip(*chosen, strict=True)])

    def __contains__(self, name: object) -> bool:
        return name in self.samples


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has done all that was asked of it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def measure_laps(
    run: Callable[[Input, LapClock], Any],
    inputs: Sequence[Input],
    *,
    device: torch.device | str,
    check: Callable[[Input, Any], str | None],
    warmup: int = 3,
    repeats: int = 20,
) -> Laps:
    """Time `run(input, clock)`, which may cut itself into laps with `clock.begin`.

    `check(input, result)` returns None for a right result, else why it is wrong; it sees the
    results of one call per input before anything is timed, and the last timed one. `warmup` more
    calls follow it, then `repeats` timed ones over the inputs in turn. What runs before the first
    `begin` counts as the lap "start". Raises `CheckFailed` with the reason, and gives no time.
    """
    if not inputs or repeats < 1 or warmup < 0:
        raise DataError(
            "a measurement needs at least one input and one repeat, got "
            f"{len(inputs)} inputs, {repeats} repeats and {warmup} calls of warm-up"
        )
    clock = LapClock(device)
    for given in inputs:
        _approve(check, given, _call(run, given, clock)[0])
    for turn in range(warmup):
        _call(run, inputs[turn % len(inputs)], clock)
    samples: dict[str, list[float]] = {}
    with _collecting_between_calls() as collect:
        for turn in range(repeats):
            given = inputs[turn % len(inputs)]
            collect()
            result, laps = _call(run, given, clock)
            for name, milliseconds in laps.items():
                samples.setdefault(name, []).append(milliseconds)
            if turn == repeats - 1:
                _approve(check, given, result)
            del result
    if len({len(times) for times in samples.values()}) != 1:
        raise CheckFailed(f"the calls do not all have the same laps: {', '.join(samples)}")
    return Laps(samples)


def measure(
    run: Callable[[Input], Any],
    inputs: Sequence[Input],
    *,
    device: torch.device | str,
    check: Callable[[Input, Any], str | None],
    warmup: int = 3,
    repeats: int = 20,
) -> Timing:
    """Time `run(input)` as a whole; see `measure_laps`."""
    laps = measure_laps(
        lambda given, clock: run(given),
        inputs,
        device=device,
        check=check,
        warmup=warmup,
        repeats=repeats,
    )
    return laps.timing()


def _call(
    run: Callable[[Input, LapClock], Any], given: Input, clock: LapClock
) -> tuple[Any, dict[str, float]]:
    synchronize(clock.device)
    clock.begin("start")
    result = run(given, clock)
    return result, clock.stop()


def _approve(check: Callable[[Input, Any], str | None], given: Input, result: Any) -> None:
    reason = check(given, result)
    if reason is not None:
        raise CheckFailed(reason)


_heap_is_quiet = False


@contextmanager
def quiet_heap() -> Iterator[None]:
    """Take the objects that live now out of Python's garbage collection for a `with` block.

    Collecting what single calls leave behind then takes microseconds instead of a good part of a
    second. Measurements do it by themselves; a program that makes many of them saves time with one
    block around all. Blocks nest; the outermost puts the objects back.
    """
    global _heap_is_quiet
    outermost = not _heap_is_quiet
    gc.collect()
    gc.freeze()
    _heap_is_quiet = True
    try:
        yield
    finally:
        if outermost:
            _heap_is_quiet = False
            gc.unfreeze()


@contextmanager
def _collecting_between_calls() -> Iterator[Callable[[], int]]:
    """Keep the garbage collector out of the timed calls; yields what collects in between.

    So no call finds the device memory of an earlier one still taken.
    """
    was_on = gc.isenabled()
    with quiet_heap():
        gc.disable()
        try:
            yield gc.collect
        finally:
            if was_on:
                gc.enable()


@dataclass(frozen=True)
class Peak:
    """Bytes of device memory: allocated before a call, and the most during it."""

    before: int
    peak: int

    @property
    def added(self) -> int:
        """What the call itself needed at most."""
        return self.peak - self.before


def peak_memory(run: Callable[[], Any], device: torch.device | str) -> Peak | None:
    """Return the peak of allocated memory while `run()` runs; None on the CPU.

    Counts what tensors take, not what the caching allocator holds in reserve.
    """
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return Peak(before, torch.cuda.max_memory_allocated(device))


@dataclass(frozen=True)
class SyncCheck:
    """Whether a region made the host wait for the device.

    places: `file:line` of every operation that CUDA's synchronization debug mode names.
    waited: the host left the region only after work that was queued before it had finished. This
    also finds waits that the debug mode does not know, such as a copy from pageable memory that
    the driver turns into a blocking one. The queue of launches is finite, so keep the region under
    about 900 of them.
    """

    places: tuple[str, ...]
    waited: bool

    @property
    def clean(self) -> bool:
        """Whether the host never waited."""
        return not self.places and not self.waited

    def __str__(self) -> str:
        if self.clean:
            return "no synchronization"
        named = ", ".join(self.places) or "an operation that the debug mode does not name"
        return f"the host waits at {named}"


@dataclass
class SyncWatch:
    """The borders of a watched region; `run` calls `start` and `stop` when it gets there."""

    device: torch.device
    mode: str
    busy: Callable[[], None] | None = None
    waited: bool | None = field(default=None, init=False)
    reached: list[str] = field(default_factory=list, init=False)
    _busy_done: Any = field(default=None, init=False)

    def start(self) -> None:
        """Enter the region: from here on the host must not wait."""
        self.reached.append("start")
        if self.busy is not None:
            torch.cuda.synchronize(self.device)
            self.busy()
            self._busy_done = torch.cuda.Event()
            self._busy_done.record(torch.cuda.current_stream(self.device))
        torch.cuda.set_sync_debug_mode(self.mode)

    def stop(self) -> None:
        """Leave the region."""
        torch.cuda.set_sync_debug_mode("default")
        self.reached.append("stop")
        if self._busy_done is not None:
            self.waited = self._busy_done.query()


def check_synchronization(
    run: Callable[[SyncWatch], Any], device: torch.device | str
) -> SyncCheck | None:
    """Find out whether the host waits for the device between `watch.start()` and `watch.stop()`.

    Calls `run(watch)` a few times, the first of them only so that memory is allocated and kernels
    are loaded. Then `torch.cuda.set_sync_debug_mode("error")` must find nothing (else a further
    call lists every place), and the host must come out of the region before about 0.1 s of work
    that was queued ahead of it is done. None on the CPU, where there is nothing to wait for.
    Raises `CheckFailed` if `run` does not go through the region exactly once.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    places: tuple[str, ...] = ()
    try:
        _watched(run, SyncWatch(device, "default"))
        try:
            _watched(run, SyncWatch(device, "error"))
        except RuntimeError as error:
            if _SYNC_MESSAGE not in str(error):
                raise
            torch.cuda.set_sync_debug_mode("default")
            places = _list_places(run, device)
        watch = _watched(run, SyncWatch(device, "default", _busy_work(device)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return SyncCheck(places, bool(watch.waited))


def _watched(run: Callable[[SyncWatch], Any], watch: SyncWatch) -> SyncWatch:
    run(watch)
    if watch.reached != ["start", "stop"]:
        raise CheckFailed(
            f"the region to watch has one start and one stop, but was run as {watch.reached}"
        )
    return watch


def _list_places(run: Callable[[SyncWatch], Any], device: torch.device) -> tuple[str, ...]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _watched(run, SyncWatch(device, "warn"))
    found = [w for w in caught if _SYNC_MESSAGE in str(w.message)]
    return tuple(dict.fromkeys(f"{w.filename}:{w.lineno}" for w in found)) or ("unknown",)


def _busy_work(device: torch.device, milliseconds: float = 100.0) -> Callable[[], None]:
    """Matrix products that keep the device busy for about that long, in few launches."""
    size = 12288  # large, because the queue of launches is finite and the region needs it
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(left)
    torch.mm(left, left, out=out)
    clock = LapClock(device)
    clock.begin("product")
    torch.mm(left, left, out=out)
    one = clock.stop()["product"]
    count = max(1, round(milliseconds / one))

    def busy() -> None:
        for _ in range(count):
            torch.mm(left, left, out=out)

    return busy
