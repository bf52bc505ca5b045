"""The kernel benchmark: its gate lets nothing wrong through, and its table says what was found."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from vistoken.commands.main import app
from vistoken.errors import BackendUnavailable, DataError
from vistoken.eval import bench_kernels, results
from vistoken.eval import bench_kernels_cases as cases
from vistoken.eval import bench_kernels_rivals as rivals
from vistoken.eval import bench_kernels_tables as tables
from vistoken.eval.bench_kernels_checks import check_backward, check_forward, sees_all
from vistoken.eval.device_timing import time_on_device
from vistoken.eval.timing import CheckFailed

CPU = torch.device("cpu")
SMALL = {case.name: case.small() for case in cases.CASES}


def reference(case: cases.Case, given: cases.Inputs) -> tuple[Tensor, Tensor]:
    """Dense attention under the mask, written down once more: out and lse."""
    every = torch.arange(case.tokens)
    mask = cases.visible(case, every, every)
    logits = torch.einsum("bqhd,bkhd->bhqk", given.q, given.k) * case.dim**-0.5
    logits = logits.masked_fill(~mask, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), given.v)
    return out, logits.logsumexp(-1).transpose(1, 2)


# --- cases ----------------------------------------------------------------------------------------


def test_case_names_and_work() -> None:
    assert len({case.name for case in cases.CASES}) == len(cases.CASES) == 12
    flux, strided = cases.choose_cases("2d-256-k80, 2d-256-k80-s16")
    assert flux.title == "2-D 256×256, k=80×80" and strided.title.endswith("stride 16×16")
    assert cases.visible_pairs(flux) == cases.visible_pairs(strided) == 256**2 * 80**2
    assert cases.touched_share(strided) == pytest.approx(1 / 10.24)
    assert cases.touched_share(flux) > cases.touched_share(strided)
    assert cases.forward_flops(flux) == 4 * 256**2 * 80**2 * 128 * 24
    (blocks,) = cases.choose_cases("blocks")
    assert cases.touched_share(blocks) == 1.0 and cases.visible_pairs(blocks) == 16384**2
    with pytest.raises(DataError, match="no case 'flux'; the cases are 2d-256-k80"):
        cases.choose_cases("flux")


@pytest.mark.parametrize("name", SMALL)
def test_visible_pairs_are_counted_right(name: str) -> None:
    case = SMALL[name]
    every = torch.arange(case.tokens)
    mask = cases.visible(case, every, every)
    assert int(mask.sum()) == cases.visible_pairs(case)
    if case.text:
        assert mask[: case.text].all() and mask[:, : case.text].all() and not mask.all()


def test_visible_is_what_the_windows_say() -> None:
    case = SMALL["3d-30x48x80-s"]
    window = next(case.where().groups())[1]  # type: ignore[union-attr]
    every = torch.arange(case.tokens)
    assert torch.equal(cases.visible(case, every, every), window.visible())


# --- the gate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2d-64-k13", "disc-256", "3d-30x48x80-s", "blocks"])
def test_the_gate_opens_for_what_is_right(name: str) -> None:
    case = SMALL[name]
    given = cases.Inputs.draw(case, CPU, torch.float32)
    leaves = [x.requires_grad_() for x in (given.q, given.k, given.v)]
    out, lse = reference(case, given)
    grads = torch.autograd.grad(out, leaves, given.d_out)
    out, lse = out.detach(), lse.detach()
    forward = check_forward(case, given, out, lse)
    backward = check_backward(case, given, out, lse, grads)
    assert set(forward.errors) == {"out", "lse"} and forward.tiles > 10
    assert set(backward.errors) == {"dq", "dk", "dv"}
    assert max((forward.errors | backward.errors).values()) < 1e-5


def test_the_gate_takes_bf16_as_dense_attention_rounds_it() -> None:
    case = SMALL["2d-64-k13"]
    given = cases.Inputs.draw(case, CPU, torch.bfloat16)
    out, lse = reference(case, cases.Inputs(*(x.float() for x in vars(given).values())))
    check = check_forward(case, given, out.bfloat16(), lse)
    assert 1e-4 < check.errors["out"] < 1e-2 and check.ratios["out"] <= 1.5
    coarse = (out * 64).round().div(64).bfloat16()
    with pytest.raises(CheckFailed, match="out is off by"):
        check_forward(case, given, coarse, lse)


WRONG = {
    "window one larger": ({"kernel_size": (6, 6)}, "out is off"),
    "window shifted": ({"kernel_size": (5, 5), "stride": (2, 2)}, "out is off"),
    "no window": ({"block": 14, "kernel_size": ()}, "out is off"),
}


@pytest.mark.parametrize(("change", "reason"), WRONG.values(), ids=WRONG.keys())
def test_the_gate_refuses_other_windows(change: dict[str, Any], reason: str) -> None:
    case = replace(SMALL["2d-64-k13"], kernel_size=(5, 5))
    given = cases.Inputs.draw(case, CPU, torch.float32)
    out, lse = reference(replace(case, **change), given)
    with pytest.raises(CheckFailed, match=reason):
        check_forward(case, given, out, lse)


def test_the_gate_refuses_damaged_results() -> None:
    case = SMALL["disc-256"]
    given = cases.Inputs.draw(case, CPU, torch.float32)
    out, lse = reference(case, given)
    for at in ((0, 3, 0), (0, case.tokens - 1, 1), (0, case.text, 0)):
        spoiled = out.clone()
        spoiled[at] = torch.nan
        with pytest.raises(CheckFailed, match="out is off by nan"):
            check_forward(case, given, spoiled, lse)
    with pytest.raises(CheckFailed, match="lse is off"):
        check_forward(case, given, out, lse + 2e-4)
    with pytest.raises(CheckFailed, match="shape"):
        check_forward(case, given, out[:, 1:], lse)


@pytest.mark.parametrize("spoiled", [0, 1, 2])
def test_the_gate_refuses_damaged_gradients(spoiled: int) -> None:
    case = SMALL["disc-256"]
    given = cases.Inputs.draw(case, CPU, torch.float32)
    leaves = [x.requires_grad_() for x in (given.q, given.k, given.v)]
    out, lse = reference(case, given)
    grads = list(torch.autograd.grad(out, leaves, given.d_out))
    grads[spoiled] = grads[spoiled].roll(1, 1)
    with pytest.raises(CheckFailed, match=f"d{'qkv'[spoiled]} is off"):
        check_backward(case, given, out.detach(), lse.detach(), grads)


# --- what it is compared with ---------------------------------------------------------------------

# a kind of case, text that no block ends with, and a grid that its tiles do not divide
ORDERS = [
    ("2d-256-k80", (1, 1), {}),
    ("2d-256-k80", (8, 16), {"grid": (30, 52), "kernel_size": (17, 30)}),
    ("2d-256-k80-s16", (8, 16), {"grid": (48, 64), "kernel_size": (24, 48), "stride": (8, 16)}),
    ("3d-21x45x80", (2, 8, 8), {"grid": (5, 18, 20), "kernel_size": (3, 17, 16)}),
    ("disc-256", (8, 16), {"grid": (30, 40), "radius": 26, "text": 130}),
    ("disc-256", (1, 1), {"grid": (30, 40), "radius": 40, "text": 130}),
    ("blocks", (1,), {}),
]


@pytest.mark.parametrize(("name", "tile", "change"), ORDERS)
def test_flex_is_told_what_is_visible(name: str, tile: tuple, change: dict[str, Any]) -> None:
    """Tokens come back as they were; mask and block lists say what `visible` does."""
    case = replace(SMALL[name], **change)
    order = rivals.Order(case, tile)
    x = torch.randn(2, case.tokens, 1, 2)
    assert torch.equal(order.restore(order.sort(x)), x)
    numbers = torch.arange(1.0, case.tokens + 1).view(1, -1, 1, 1)
    at = order.sort(numbers).flatten().long() - 1  # which token stands where, -1 for none
    there = at >= 0
    every, place = torch.arange(case.tokens), torch.arange(order.tokens)
    expected = cases.visible(case, every, every)[at][:, at] & there
    mask = order.block_mask(CPU)
    found = mask.mask_mod(0, 0, place[:, None], place[None]).expand(len(place), -1)
    assert torch.equal(found[there], expected[there])
    touched, full = order._blocks
    side, blocks = rivals.BLOCK, len(touched)
    whole = torch.zeros(blocks * side, blocks * side, dtype=torch.bool)
    whole[: len(place), : len(place)] = found
    rows = torch.nn.functional.pad(there, (0, blocks * side - len(place))).view(blocks, side, 1, 1)
    split = whole.view(blocks, side, blocks, side)
    assert not ((split & rows).any(3).any(1) & ~touched).any()
    assert not (full & ~(split | ~rows).all(3).all(1)).any()
    lists = zip(mask.full_kv_num_blocks[0, 0], mask.full_kv_indices[0, 0], strict=True)
    listed = torch.zeros_like(full)
    for row, (count, index) in enumerate(lists):
        listed[row, index[:count].long()] = True
    assert torch.equal(listed, full)


def test_rivals_that_cannot_run_say_why() -> None:
    for name, case in (("natten", SMALL["disc-256"]), ("flex_tiled", SMALL["blocks"])):
        with pytest.raises(BackendUnavailable):
            rivals.RIVALS[name](case, cases.Inputs.draw(case, CPU, torch.float32))


def test_dense_is_dense() -> None:
    case = SMALL["2d-64-k13"]
    given = cases.Inputs.draw(case, CPU, torch.float32)
    out = rivals.dense(case, given)()
    check_forward(case, given, out, seen=sees_all)
    with pytest.raises(CheckFailed):
        check_forward(case, given, out)


def test_times_are_taken_as_often_as_asked() -> None:
    calls: list[int] = []
    timing = time_on_device(lambda: calls.append(1), CPU, budget=1e6, most=7)
    assert timing.samples == 7 and len(calls) == 10
    timing = time_on_device(lambda: calls.append(1), CPU, budget=0.0, least=2)
    assert timing.samples == 2


# --- a run ----------------------------------------------------------------------------------------

RUN = ("bench", "kernels", "--quick", "--device", "cpu")


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, [*RUN, *words])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_run_measures_and_writes(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    found = invoke("--cases", "disc-256", "--output", str(path))
    assert found.exit_code == 0, found.output
    some = ("--backends", "ours,backward,dense,natten", "--append", "--output", str(path))
    assert invoke("--cases", "2d-64-k13,blocks", *some).exit_code == 0
    result = results.load(path, "bench_kernels")
    assert [row["name"] for row in result.rows] == ["disc-256", "blocks", "2d-64-k13"]
    for row in result.rows:
        flex = ("flex_raster", "flex_tiled") if row["name"] == "disc-256" else ()
        for name in ("ours", "backward", "dense", *flex):
            assert row[name]["ms"]["median"] > 0 and row[name]["check"]["tiles"] > 0, name
        assert "unavailable" in row["natten"] or "ms" in row["natten"]
    assert result.settings["dtype"] == "float32" and result.settings["quick"]
    assert result.checks == {"failed": [], "goals": []}
    assert "disc r=4 + 20 text" in found.output


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(case: cases.Case, *given: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        wider = tuple(size + 1 for size in case.kernel_size)
        return cases.attend(replace(case, kernel_size=wider), *given, **options)

    monkeypatch.setattr(bench_kernels, "attend", wrong)
    path = tmp_path / "out.json"
    found = invoke(
        "--cases", "2d-64-k13", "--backends", "ours,backward,dense", "--output", str(path)
    )
    assert found.exit_code == 1 and "FAILED 2d-64-k13, ours: out is off" in found.output
    (row,) = json.loads(path.read_text())["rows"]
    assert "ms" not in row["ours"] and "ms" not in row["backward"] and "ms" in row["dense"]


def test_an_unsteady_backward_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unsteady(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * (1 + 1e-6 * torch.rand_like(grad))

    def attend(case: cases.Case, *given: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = cases.attend(case, *given, **options)
        return Unsteady.apply(out), lse

    monkeypatch.setattr(bench_kernels, "attend", attend)
    found = invoke("--cases", "2d-64-k13", "--backends", "backward")
    assert found.exit_code == 1 and "two runs of the backward differ" in found.output


def test_more_cases_are_appended_to_the_same_machine(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    words = ("--backends", "dense", "--output", str(path))
    assert invoke("--cases", "2d-128-k13", *words).exit_code == 0
    assert invoke("--cases", "2d-64-k13", "--append", *words).exit_code == 0
    result = results.load(path)
    assert [row["name"] for row in result.rows] == ["2d-64-k13", "2d-128-k13"]
    assert result.settings["cases"] == ["2d-64-k13", "2d-128-k13"]
    machine = {**result.machine, "device": "another"}
    replace(result, machine=machine).write(path)
    refused = invoke("--cases", "2d-64-k13", "--append", *words)
    assert refused.exit_code == 2 and "has another device, another, than now" in refused.output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--cases", "nothing"), "there is no case 'nothing'"),
        (("--backends", "fast"), "there is no backend 'fast'"),
        (("--append",), "--append needs --output"),
        (("--device", "warp"), "no torch device"),
    ],
)
def test_bad_options(words: tuple[str, ...], reason: str) -> None:
    found = invoke(*words)
    assert found.exit_code == 2 and reason in found.output


# --- tables ---------------------------------------------------------------------------------------


def timed(case: cases.Case, **ms: float) -> dict[str, Any]:
    """A row as a run leaves it."""
    columns = {
        name: {"ms": {"median": value, "p20": value, "p80": value, "samples": 3}}
        for name, value in ms.items()
    }
    facts = {"pairs": 1, "flops": cases.forward_flops(case), "touched_share": 0.1}
    row = {**case.to_dict(), **facts, **columns}
    row["ours"] |= {"memory": {"extra": 4, "q": 100}, "kernel": "forward"}
    return row


def result_of(*rows: dict[str, Any], quick: bool = False) -> results.ResultFile:
    settings = {"dtype": "bfloat16", "quick": quick}
    return results.ResultFile("bench_kernels", results.machine("cpu"), settings, rows, {})


def test_the_table_says_what_was_measured() -> None:
    flux, _, *others = cases.CASES
    rows = [
        timed(flux, ours=10.0, backward=25.0, dense=95.0, flex_raster=61.0),
        timed(others[-1], ours=0.5, natten=0.75),
    ]
    rows[1]["backward"] = {"failed": "dq is off"}
    grid = tables.time_grid(result_of(*rows))
    cells = [dict(zip(grid.columns, row, strict=True)) for row in grid.rows]
    assert cells[0]["Goal"] == "≤ 11.5, met" and cells[0]["Backward"] == "25.0 (2.50×)"
    assert cells[0]["Dense"] == "95.0 (9.50×)" and cells[0]["Of bound"] == "95%"
    assert cells[0]["NATTEN"] == "*18.6 (1.86×)*" and "publishes" in grid.note
    assert cells[0]["TFLOP/s"] == f"{4 * 256**2 * 80**2 * 128 * 24 / 10e-3 / 1e12:.0f}"
    assert cells[0]["Extra memory"] == "4.0%" and cells[0]["<Kernel"] == "forward"
    assert cells[1]["Goal"] == "" and cells[1]["NATTEN"] == "0.75 (1.50×)"
    assert cells[1]["Backward"] == "failed" and cells[1]["Flex tiled"] == ""


def test_goals_that_are_met_and_missed() -> None:
    flux = cases.CASES[0]
    good = result_of(timed(flux, ours=11.5, backward=31.0))
    assert [goal.met for goal in tables.goals(good)] == [True, True, True]
    bad_row = timed(flux, ours=11.6, backward=31.5)
    bad_row["ours"]["memory"]["extra"] = 5
    assert [goal.met for goal in tables.goals(result_of(bad_row))] == [False, False, False]
    assert tables.goals(result_of(bad_row, quick=True)) == []


def test_a_row_that_failed_has_no_figures(tmp_path: Path) -> None:
    row = timed(cases.CASES[0], ours=1.0)
    row["ours"] = {"failed": "out is off by 1"}
    result = result_of(row)
    assert tables.failures(result) == ["2d-256-k80, ours: out is off by 1"]
    assert tables.goals(result) == []
    result.write(tmp_path / "bench_kernels.json")
    (line,) = [text for text in tables.readme_table(tmp_path).splitlines() if "256×256" in text]
    assert line.split(" | ")[1] == "failed" and "TFLOP" not in line
