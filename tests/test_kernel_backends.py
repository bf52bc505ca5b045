"""The choice of a backend: argument, context, environment, automatic; and its reasons."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from vistoken.errors import BackendUnavailable
from vistoken.kernels import (
    BACKENDS,
    explain_backends,
    grid_attention,
    grid_reference,
    grid_tiled,
    na1d,
    neighborhood,
    pick_diverse,
    use_backend,
)
from vistoken.kernels.backends import automatic_backends, select_backend

Q = torch.randn(1, 5, 2, 4)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VISTOKEN_BACKEND", raising=False)


def selected(
    backend: str | None = None, reasons: dict[str, str] | None = None, **given: Any
) -> str:
    options = {"offered": BACKENDS, "automatic": ("triton", "tiled"), **given}
    return select_backend("na9d", backend, (reasons or {}).get, **options)


# --- which one -----------------------------------------------------------------------------------


def test_order_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    assert selected() == "triton"
    assert selected(reasons={"triton": "no"}) == "tiled"
    monkeypatch.setenv("VISTOKEN_BACKEND", "natten")
    assert selected() == "natten"
    with use_backend("flex"):
        assert selected() == "flex"
        assert selected("reference") == "reference"
        with use_backend("tiled"):
            assert selected() == "tiled"
        assert selected() == "flex"
        with pytest.raises(ZeroDivisionError), use_backend("tiled"):
            _ = 1 / 0
        assert selected() == "flex"
    assert selected() == "natten"
    monkeypatch.setenv("VISTOKEN_BACKEND", "")
    assert selected() == "triton"


def test_what_is_asked_for_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"flex": "it is Tuesday"}
    words = "na9d cannot run on flex, which {} asks for: it is Tuesday."
    with pytest.raises(BackendUnavailable, match=words.format("backend")):
        selected("flex", bad)
    with use_backend("flex"), pytest.raises(BackendUnavailable, match=words.format("use_backend")):
        selected(None, bad)
    monkeypatch.setenv("VISTOKEN_BACKEND", "flex")
    with pytest.raises(BackendUnavailable, match=words.format("VISTOKEN_BACKEND")):
        selected(None, bad)
    with pytest.raises(
        BackendUnavailable, match="na9d has the backends tiled, got 'flex' from VIS"
    ):
        selected(offered=("tiled",))


def test_nothing_can_run() -> None:
    with pytest.raises(BackendUnavailable, match="no backend here. triton: old; tiled: slow."):
        selected(reasons={"triton": "old", "tiled": "slow"})


def test_names_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="use_backend names one of .*, got 'cuda'"):
        use_backend("cuda").__enter__()
    monkeypatch.setenv("VISTOKEN_BACKEND", "fast")
    for call in (selected, lambda: pick_diverse(Q[0, 0, None, :2, :2], Q[0, 0, :1, :2], 0, 1)):
        with pytest.raises(BackendUnavailable, match="VISTOKEN_BACKEND names one of .* got 'fast'"):
            call()
    assert selected("tiled") == "tiled"


def test_a_context_is_of_its_thread() -> None:
    with use_backend("flex"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(selected).result() == "triton"


def test_automatic_choice() -> None:
    assert automatic_backends(CUDA) == ("triton", "tiled")
    assert automatic_backends(CPU) == automatic_backends(torch.device("mps")) == ("tiled",)


# --- the operations ------------------------------------------------------------------------------


@pytest.fixture()
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that ran."""
    names: list[str] = []
    for name, module in (("reference", grid_reference), ("tiled", grid_tiled)):

        def forward(*given: Any, name: str = name, before: Any = module.forward) -> Any:
            names.append(name)
            return before(*given)

        monkeypatch.setattr(module, "forward", forward)
    return names


def test_attention_runs_on_what_was_chosen(ran: list[str], monkeypatch: Any) -> None:
    na1d(Q, Q, Q, 3)
    with use_backend("reference"):
        grid_attention(Q, Q, Q, neighborhood((5,), 3))
        na1d(Q, Q, Q, 3, backend="tiled")
    monkeypatch.setenv("VISTOKEN_BACKEND", "reference")
    na1d(Q, Q, Q, 2, dilation=2)
    assert ran == ["tiled", "reference", "tiled", "reference", "reference"]


def test_compiled_functions_follow_the_context(ran: list[str]) -> None:
    compiled = torch.compile(lambda q: na1d(q, q, q, 3), backend="eager", fullgraph=True)
    wanted = na1d(Q, Q, Q, 3)
    ran.clear()
    for name, traced in ((None, []), ("reference", ["reference"]), (None, []), ("tiled", [])):
        with use_backend(name) if name else nullcontext():
            assert (compiled(Q) - wanted).abs().max() < 1e-6
            assert (ran == []) == (traced == []), name  # `tiled` is an operator there
            ran.clear()


def test_operations_without_the_backend_choose_for_themselves() -> None:
    similarity, weight, first = torch.rand(1, 6, 6), torch.rand(1, 6), torch.tensor([2])
    wanted = pick_diverse(similarity, weight, first, 3)
    for name in ("tiled", "flex", "natten", "reference"):
        with use_backend(name):
            assert torch.equal(pick_diverse(similarity, weight, first, 3), wanted)
    with pytest.raises(BackendUnavailable, match="pick_diverse has the backends"):
        pick_diverse(similarity, weight, first, 3, backend="tiled")


def test_operations_with_the_backend_obey(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="on triton"):
        pick_diverse(torch.rand(1, 6, 6), torch.rand(1, 6), torch.tensor([2]), 3)


def test_reasons_are_listed() -> None:
    given = (Q.double(), Q.double(), Q.double(), neighborhood((5,), 3))
    rows = {row.backend: row for row in explain_backends(*given)}
    assert tuple(rows) == BACKENDS
    assert all(row.runs == (row.reason == "") for row in rows.values())
    assert rows["reference"].runs and rows["tiled"].runs and not rows["triton"].runs
    assert [name for name, row in rows.items() if row.chosen] == ["tiled"]
    with use_backend("reference"):
        assert [row.backend for row in explain_backends(*given) if row.chosen] == ["reference"]
    with use_backend("triton"):
        assert not any(row.chosen for row in explain_backends(*given))
