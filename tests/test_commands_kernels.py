"""`vistoken kernels`: what runs here and why not, and what tiles cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vistoken.commands.main import app
from vistoken.kernels import BACKENDS


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["kernels", *words])


def answer(*words: str) -> Any:
    found = invoke(*words, "--json")
    assert found.exit_code == 0, found.output
    return json.loads(found.output)


def simulate(*words: str) -> Any:
    return answer("simulate", *words)


# --- simulate -------------------------------------------------------------------------------------


def test_simulate_gives_the_published_bounds() -> None:
    hunyuan = ("30x48x80", "--kernel-size", "18x24x24", "--q-tile", "4x8x8", "--kv-tile", "2x8x8")
    plain = simulate(*hunyuan, "--no-advice")
    strided = simulate(*hunyuan, "--stride", "16,8,8", "--no-advice")
    (ours, given), (_, given_strided) = plain["tiles"], strided["tiles"]
    assert (ours["kind"], given["kind"]) == ("ours", "given")
    assert round(given["interior_bound"], 2) == 3.27
    assert round(given_strided["interior_bound"], 2) == 11.11
    assert given_strided["block_sparse"] and not given["block_sparse"]
    assert ours["exact_bound"] > given["exact_bound"] and ours["permute_bytes"] == 0
    assert plain["tokens"] == 115200 and plain["visible_pairs"] == 115200 * 18 * 24 * 24


def test_simulate_ranks_tiles_strides_and_windows() -> None:
    found = simulate("256x256", "--kernel-size", "80", "--top", "3", "--heads", "24")
    kinds = [one["kind"] for one in found["tiles"]]
    assert kinds == ["ours", "usual", "aligned", "aligned", "aligned"]
    assert found["tiles"][1]["permute_bytes"] == 8 * 65536 * 24 * 128 * 2
    assert [one["block_sparse"] for one in found["windows"]] == [True] * 3
    assert found["strides"][0]["full_share"] == 1.0 and len(found["strides"]) <= 3


def test_simulate_prints_tables() -> None:
    found = invoke("simulate", "64×64", "--kernel-size", "13", "--stride", "4", "--top", "2")
    assert found.exit_code == 0
    for words in (
        "64×64 = 4096 tokens, a window of 13×13: a query sees 169.0 keys on average, 1 / 24.24",
        "exact", "unmasked", "Strides for this window", "usual",
    ):  # fmt: skip
        assert words in found.output
    assert len(max(found.output.splitlines(), key=len)) <= 120


def test_simulate_takes_dilation_causal_axes_and_discs() -> None:
    causal = simulate("40", "--kernel-size", "5", "--dilation", "3", "--is-causal", "yes")
    assert causal["is_causal"] == [True] and causal["dilation"] == [3]
    # three interleaved lines of 14, 13 and 13 tokens; the first four of each see fewer keys
    assert causal["visible_pairs"] == 3 * (1 + 2 + 3 + 4) + 5 * (10 + 9 + 9)
    disc = simulate("20x30", "--radius", "2", "--q-tile", "4x4", "--kv-tile", "4x8")
    # the token itself, those beside it and, at a squared distance of 2, those at the corners
    beside = 2 * (19 * 30 + 20 * 29) + 4 * 19 * 29
    assert disc["visible_pairs"] == 600 + beside and disc["radius"] == 2
    assert disc["tiles"][1]["q_tile"] == [1, 4, 4] and disc["strides"] == []
    assert "a disc of radius 2" in invoke("simulate", "20x30", "--radius", "2").output


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("8x8",), "Give either --kernel-size or --radius"),
        (("8x8", "--kernel-size", "3", "--radius", "2"), "Give either"),
        (("8x8", "--kernel-size", "9"), "kernel_size * dilation must lie between"),
        (("8x8", "--kernel-size", "3", "--stride", "4"), "stride must lie in 1..kernel_size = 3"),
        (("8x8", "--kernel-size", "3x3x3"), "kernel_size must be one int or 2 of them"),
        (("8xa", "--kernel-size", "3"), "GRID must be numbers such as 30x48x80, got '8xa'"),
        (("8x8", "--kernel-size", "3", "--is-causal", "perhaps"), "--is-causal must be yes or no"),
        (("8x8", "--kernel-size", "3", "--q-tile", "4x4"), "given together"),
        (("8x8", "--kernel-size", "3", "--q-tile", "4", "--kv-tile", "4"), "for each of the 2"),
        (("8x8", "--radius", "2", "--stride", "2"), "A disc has no stride"),
        (("8", "--radius", "2"), "A disc needs a grid"),
        (("8x8", "--kernel-size", "3", "--dtype", "int4"), "--dtype must be one of bf16"),
    ],
)
def test_bad_options_get_one_line(words: tuple[str, ...], reason: str) -> None:
    found = invoke("simulate", *words)
    assert found.exit_code == 2 and found.output.startswith("error: ")
    assert reason in found.output and found.output.count("\n") == 1


# --- --why ----------------------------------------------------------------------------------------


def test_why_names_every_backend_with_a_reason() -> None:
    rows = answer("--why", "--device", "cpu", "--dtype", "fp32")
    assert [row["backend"] for row in rows] == list(BACKENDS)
    assert [row["backend"] for row in rows if row["chosen"]] == ["tiled"]
    assert all(row["runs"] != bool(row["reason"]) for row in rows if row["backend"] != "triton")
    text = invoke("--why", "--device", "cpu", "--dtype", "fp32").output
    assert "yes, chosen" in text and all(row["reason"][:20] in text for row in rows)


def test_why_is_about_the_shape_that_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(backend: str, *words: str) -> str:
        rows = answer("--why", "--device", "cpu", *words)
        return next(row["reason"] for row in rows if row["backend"] == backend)

    monkeypatch.setenv("VISTOKEN_BACKEND", "reference")
    rows = answer("--why", "--device", "cpu")
    assert [row["backend"] for row in rows if row["chosen"]] == ["reference"]
    assert not reason("reference", "--dilation", "2", "--kernel-size", "5")
    assert reason("tiled", "--grid", "9x7", "--radius", "3") == ""
    assert reason("tiled", "--grid", "5x9x7", "--kernel-size", "3", "--kv-heads", "2") == ""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--heads", "3", "--kv-heads", "2"), "3"),
        (("--grid", "8x8", "--kernel-size", "9"), "kernel_size * dilation"),
        (("--device", "warp"), "There is no device 'warp'"),
    ],
)
def test_why_refuses_what_no_backend_takes(words: tuple[str, ...], reason: str) -> None:
    found = invoke("--why", *words)
    assert found.exit_code == 2 and found.output.startswith("error: ") and reason in found.output


def test_without_anything_there_is_help() -> None:
    found = invoke()
    assert found.exit_code == 0 and "simulate" in found.output and "--why" in found.output


@pytest.mark.gpu
def test_why_on_a_gpu() -> None:
    rows = {row["backend"]: row for row in answer("--why", "--device", "cuda")}
    assert rows["triton"]["chosen"] and torch.cuda.is_available()
