"""The benchmark harness: nothing wrong is timed, laps add up, waits of the host are found."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vistoken.errors import BackendUnavailable, DataError
from vistoken.eval import timing
from vistoken.eval.timing import (
    CheckFailed,
    LapClock,
    SyncWatch,
    Timing,
    check_synchronization,
    measure,
    measure_laps,
    peak_memory,
)


def fine(given: Any, result: Any) -> str | None:
    return None


# --- summaries -----------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=40))
def test_percentiles_are_numpys(values: list[float]) -> None:
    found = Timing.of(values)
    expected = np.percentile(values, [50, 20, 80])
    np.testing.assert_allclose([found.median, found.p20, found.p80], expected, rtol=1e-12)
    assert found.samples == len(values)


def test_a_timing_reads_as_median_and_spread() -> None:
    assert str(Timing(1.234, 1.2, 1.3, 5)) == "1.23 (1.20-1.30)"
    assert str(Timing(123.4, 120.0, 130.0, 5)) == "123.4 (120.0-130.0)"
    with pytest.raises(ValueError, match="at least one sample"):
        Timing.of([])


# --- the clock -----------------------------------------------------------------------------------


def test_laps_add_up_to_the_whole() -> None:
    clock = LapClock("cpu")
    start = time.perf_counter()
    for name, seconds in (("a", 0.02), ("b", 0.03), ("a", 0.02)):
        clock.begin(name)
        time.sleep(seconds)
    laps = clock.stop()
    whole = (time.perf_counter() - start) * 1000
    assert list(laps) == ["a", "b"]
    assert laps["a"] >= 40 and laps["b"] >= 30
    assert 70 <= sum(laps.values()) <= whole
    clock.begin("c")
    assert list(clock.stop()) == ["c"]  # it starts afresh


def test_other_devices_are_refused() -> None:
    with pytest.raises(BackendUnavailable, match="'meta'"):
        LapClock("meta")


def test_laps_of_a_call_are_summed_call_by_call() -> None:
    laps = timing.Laps({"a": [1.0, 2.0, 30.0], "b": [10.0, 0.5, 1.0]})
    assert laps.timing("a").median == 2.0
    assert laps.timing("a", "b").median == 11.0  # of 11, 2.5 and 31, not 2 + 1
    assert laps.timing() == laps.timing("a", "b")
    assert "a" in laps and "c" not in laps


# --- check, warm up, rotate ----------------------------------------------------------------------


def test_calls_are_checked_then_warmed_up_then_timed_in_turn() -> None:
    calls: list[str] = []
    checks: list[tuple[str, str]] = []

    def check(given: str, result: str) -> str | None:
        checks.append((given, result))
        return None

    def run(given: str) -> str:
        calls.append(given)
        return given.upper()

    found = measure(run, ["a", "b", "c"], device="cpu", check=check, warmup=2, repeats=4)
    assert calls == ["a", "b", "c", *("a", "b"), *("a", "b", "c", "a")]
    assert checks == [("a", "A"), ("b", "B"), ("c", "C"), ("a", "A")]
    assert found.samples == 4


def test_a_wrong_result_gets_no_time() -> None:
    calls = []
    with pytest.raises(CheckFailed, match="it is 2, not 1"):
        measure(
            calls.append,
            [1, 2, 3],
            device="cpu",
            check=lambda given, result: None if given == 1 else f"it is {given}, not 1",
        )
    assert calls == [1, 2]  # nothing ran after the failed check


def test_a_result_that_goes_wrong_while_timed_gets_no_time() -> None:
    calls = []

    def run(given: int) -> int:
        calls.append(given)
        return len(calls)

    with pytest.raises(CheckFailed, match="the sixth"):
        measure(
            run,
            [0],
            device="cpu",
            check=lambda given, result: "the sixth" if result == 6 else None,
            warmup=1,
            repeats=4,
        )


def test_laps_of_a_measurement() -> None:
    def run(given: float, clock: LapClock) -> None:
        clock.begin("first")
        time.sleep(given)
        clock.begin("second")
        time.sleep(2 * given)

    laps = measure_laps(run, [0.01, 0.01], device="cpu", check=fine, warmup=0, repeats=3)
    assert list(laps.samples) == ["start", "first", "second"]
    assert laps.timing("first").median >= 10 and laps.timing("second").median >= 20
    assert laps.timing().median >= 30


def test_calls_with_different_laps_are_refused() -> None:
    def run(given: int, clock: LapClock) -> None:
        clock.begin(f"lap {given}")

    with pytest.raises(CheckFailed, match="same laps"):
        measure_laps(run, [1, 2], device="cpu", check=fine, repeats=4)


@pytest.mark.parametrize("inputs, repeats, warmup", [([], 1, 0), ([1], 0, 0), ([1], 1, -1)])
def test_a_measurement_of_nothing_is_refused(inputs: list, repeats: int, warmup: int) -> None:
    with pytest.raises(DataError, match="at least one input and one repeat"):
        measure(abs, inputs, device="cpu", check=fine, repeats=repeats, warmup=warmup)


class Cycle:
    """Garbage that only the collector frees."""

    alive = 0

    def __init__(self) -> None:
        Cycle.alive += 1
        self.me = self

    def __del__(self) -> None:
        Cycle.alive -= 1


def test_garbage_is_collected_between_calls_and_never_in_one() -> None:
    seen = []
    frozen = gc.get_freeze_count()

    def run(given: int) -> None:
        seen.append((gc.isenabled(), Cycle.alive))
        Cycle()

    measure(run, [0], device="cpu", check=fine, warmup=0, repeats=5)
    assert seen[1:] == [(False, 0)] * 5
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_the_collector_is_back_after_an_error() -> None:
    frozen = gc.get_freeze_count()

    def run(given: int) -> None:
        if not gc.isenabled():
            raise KeyError("in the middle")

    with pytest.raises(KeyError):
        measure(run, [0], device="cpu", check=fine)
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_a_quiet_heap_lasts_until_the_outermost_block_ends() -> None:
    frozen = gc.get_freeze_count()
    with timing.quiet_heap():
        outside = gc.get_freeze_count()
        assert outside > frozen
        measure(abs, [1], device="cpu", check=fine, repeats=1)
        assert gc.get_freeze_count() >= outside
    assert gc.get_freeze_count() == frozen


# --- waits of the host, with CUDA played by a stand-in --------------------------------------------


class FakeCuda:
    """Stands for torch.cuda: an operation that waits, and a queue that the host may outrun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, slow_copy: bool = False) -> None:
        self.mode = "default"
        self.busy = False
        self.slow_copy = slow_copy
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)
        monkeypatch.setattr(torch.cuda, "synchronize", self.drain)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(timing, "_busy_work", lambda device: self.fill)

    def set_mode(self, mode: str) -> None:
        self.mode = mode

    def drain(self, device: Any = None) -> None:
        self.busy = False

    def fill(self) -> None:
        self.busy = True

    def event(self) -> Any:
        fake = self

        class Event:
            def record(self, stream: Any) -> None:
                pass

            def query(self) -> bool:
                return not fake.busy

        return Event()

    def read_back(self) -> None:
        """Copy a value to the host."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.mode == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        self.drain()

    def copy_pageable(self) -> None:
        """A copy whose wait the debug mode does not know."""
        if self.slow_copy:
            self.drain()


def test_a_clean_region(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def run(watch: SyncWatch) -> None:
        cuda.read_back()  # before the region: allowed
        watch.start()
        cuda.copy_pageable()
        watch.stop()
        cuda.read_back()

    found = check_synchronization(run, "cuda")
    assert found is not None and found.clean and str(found) == "no synchronization"
    assert cuda.mode == "default"


def test_every_place_that_waits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def run(watch: SyncWatch) -> None:
        watch.start()
        cuda.read_back()
        cuda.read_back()
        watch.stop()

    found = check_synchronization(run, "cuda")
    assert found is not None and not found.clean and found.waited
    first = run.__code__.co_firstlineno + 2
    assert found.places == (f"{__file__}:{first}", f"{__file__}:{first + 1}")
    assert f"{first + 1}" in str(found)
    assert cuda.mode == "default"


def test_a_wait_that_the_debug_mode_does_not_know_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch, slow_copy=True)

    def run(watch: SyncWatch) -> None:
        watch.start()
        cuda.copy_pageable()
        watch.stop()

    found = check_synchronization(run, "cuda")
    assert found is not None and not found.clean
    assert found.waited and found.places == () and "does not name" in str(found)


def test_other_errors_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def run(watch: SyncWatch) -> None:
        watch.start()
        if cuda.mode == "error":
            raise RuntimeError("out of memory")
        watch.stop()

    with pytest.raises(RuntimeError, match="out of memory"):
        check_synchronization(run, "cuda")
    assert cuda.mode == "default"


@pytest.mark.parametrize("borders", [(), ("start",), ("start", "stop", "start", "stop")])
def test_a_region_that_is_not_run_once_is_refused(
    monkeypatch: pytest.MonkeyPatch, borders: tuple[str, ...]
) -> None:
    FakeCuda(monkeypatch)

    def run(watch: SyncWatch) -> None:
        for border in borders:
            getattr(watch, border)()

    with pytest.raises(CheckFailed, match="one start and one stop"):
        check_synchronization(run, "cuda")


def test_the_cpu_has_nothing_to_wait_for() -> None:
    def never(*args: Any) -> None:
        raise AssertionError("called")

    assert check_synchronization(never, "cpu") is None
    assert peak_memory(never, "cpu") is None


# --- with a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_cuda_events_time_the_device_not_the_launch() -> None:
    left = torch.randn(4096, 4096, device="cuda")

    def run(given: int) -> torch.Tensor:
        out = left
        for _ in range(given):
            out = left @ out
        return out

    few, many = (measure(run, [n], device="cuda", check=fine, repeats=10) for n in (4, 16))
    assert 3 < many.median / few.median < 5


@pytest.mark.gpu
def test_peak_memory_counts_what_a_call_allocates() -> None:
    held = torch.empty(1 << 20, device="cuda")

    def run() -> None:
        torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
        torch.empty(4 << 20, dtype=torch.uint8, device="cuda")

    peak = peak_memory(run, "cuda")
    assert peak is not None and peak.before >= held.nbytes and peak.added == 8 << 20


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("operation", "clean"),
    [
        (lambda x: x.add(1).sort(), True),
        (lambda x: x.sum().item(), False),
        (lambda x: x.nonzero(), False),
        (lambda x: torch.arange(9).to("cuda"), False),
    ],
)
def test_cuda_synchronizations(operation: Callable[[torch.Tensor], Any], clean: bool) -> None:
    x = torch.randn(64, device="cuda")

    def run(watch: SyncWatch) -> None:
        watch.start()
        operation(x)
        watch.stop()

    found = check_synchronization(run, "cuda")
    assert found is not None and found.clean == clean
    if not clean:
        assert found.places and all("test_timing.py:" in place for place in found.places)
