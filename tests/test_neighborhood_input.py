"""What neighborhood attention refuses: one clear error, before anything is computed."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vistoken.errors import BackendUnavailable, MethodError
from vistoken.kernels import disc_window, grid_attention, na1d, na2d, na3d, neighborhood

GOOD: dict[str, Any] = {
    "q": torch.zeros(2, 4, 6, 4, 3),
    "k": torch.zeros(2, 4, 6, 2, 3),
    "v": torch.zeros(2, 4, 6, 2, 5),
    "kernel_size": 3,
}
EXTRA = {"additional_keys": torch.zeros(2, 7, 2, 3), "additional_values": torch.zeros(2, 7, 2, 5)}


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": [[1.0]]}, "q must be a tensor, got list"),
        ({"k": None}, "k must be a tensor, got NoneType"),
        ({"q": zeros(4, 6, 4, 3)}, r"q must have the axes \[batch, height, width, heads, channels"),
        ({"v": zeros(2, 1, 4, 6, 2, 5)}, r"v must have the axes .* \(2, 1, 4, 6, 2, 5\)"),
        ({"q": zeros(2, 4, 6, 4, 3, dtype=torch.int64)}, "q must have one of .* got torch.int64"),
        ({"q": zeros(2, 4, 6, 4, 3, dtype=torch.cfloat)}, "got torch.complex64"),
        (
            {"k": zeros(2, 4, 6, 2, 3, dtype=torch.half)},
            "k must have the dtype of q, torch.float32",
        ),
        ({"v": zeros(2, 4, 6, 2, 5, device="meta")}, "v must be on the device of q, cpu, got meta"),
        ({"q": zeros(2, 4, 6, 4, 3).to_sparse()}, "q must be a dense tensor, got layout"),
        ({"q": zeros(2, 4, 6, 0, 3)}, "q must have at least one head"),
        ({"k": zeros(2, 4, 6, 0, 3)}, "k must have at least one head"),
        ({"q": zeros(2, 4, 6, 4, 0)}, "q must have at least one channel"),
        ({"v": zeros(2, 4, 6, 2, 0)}, "v must have at least one channel"),
        ({"k": zeros(2, 4, 6, 3, 3), "v": zeros(2, 4, 6, 3, 5)}, "got 4 heads of q and 3 of k"),
        ({"k": zeros(2, 4, 6, 8, 3), "v": zeros(2, 4, 6, 8, 5)}, "got 4 heads of q and 8 of k"),
        (
            {"k": zeros(2, 4, 6, 2, 4)},
            r"k must have the shape \(2, 4, 6, 2, 3\) .* \(2, 4, 6, 2, 4\)",
        ),
        ({"k": zeros(1, 4, 6, 2, 3)}, r"k must have the shape .* to go with q, got \(1, "),
        ({"k": zeros(2, 6, 4, 2, 3)}, r"k must have the shape .* got \(2, 6, 4"),
        ({"v": zeros(2, 4, 5, 2, 5)}, r"v must have the shape \(2, 4, 6, 2, 5\) .* go with k"),
        ({"v": zeros(2, 4, 6, 4, 5)}, r"v must have the shape \(2, 4, 6, 2, 5\)"),
        ({"scale": math.nan}, "scale must be a finite number .* got nan"),
        ({"scale": math.inf}, "got inf"),
        ({"scale": True}, "got True"),
        ({"scale": "1"}, "got '1'"),
        ({"scale": torch.tensor(1.0)}, "scale must be a finite number"),
        ({"kernel_size": 5}, r"4 tokens, got 5 \* 1 on axis 0"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size must be one int or 2 of them"),
        ({"stride": 4}, "stride must lie in 1..kernel_size = 3, got 4"),
        ({"dilation": (1, 3)}, r"6 tokens, got 3 \* 3 on axis 1"),
        ({"is_causal": 1}, "is_causal must be one bool"),
        ({"q": zeros(2, 0, 6, 4, 3), "k": zeros(2, 0, 6, 2, 3), "v": zeros(2, 0, 6, 2, 5)}, "axes"),
        (
            {"additional_keys": EXTRA["additional_keys"]},
            "additional_keys without additional_values",
        ),
        ({"additional_values": EXTRA["additional_values"]}, "values without additional_keys"),
        (
            {**EXTRA, "additional_keys": zeros(7, 2, 3)},
            r"additional_keys .* \[batch, tokens, heads",
        ),
        ({**EXTRA, "additional_keys": zeros(1, 7, 2, 3)}, r"additional_keys .* got \(1, 7, 2, 3\)"),
        ({**EXTRA, "additional_keys": zeros(2, 7, 4, 3)}, r"additional_keys .* \(2, 7, 2, 3\) to"),
        ({**EXTRA, "additional_keys": zeros(2, 7, 2, 5)}, r"additional_keys .* got \(2, 7, 2, 5\)"),
        ({**EXTRA, "additional_values": zeros(2, 6, 2, 5)}, r"additional_values .* \(2, 7, 2, 5\)"),
        ({**EXTRA, "additional_values": zeros(2, 7, 2, 3)}, r"additional_values .* \(2, 7, 2, 5\)"),
        ({**EXTRA, "additional_values": zeros(2, 7, 2, 5).double()}, "additional_values .* dtype"),
        ({**EXTRA, "additional_keys": zeros(2, 7, 2, 3, device="meta")}, "additional_keys .* meta"),
    ],
)
def test_bad_arguments(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", None)  # what follows the checks would need it
    with pytest.raises(MethodError, match=words):
        na2d(**{**GOOD, **changes})


def test_every_rank_knows_its_axes() -> None:
    for function, axes in ((na1d, r"length"), (na3d, "frames, height, width")):
        with pytest.raises(MethodError, match=rf"\[batch, {axes}, heads, channels\]"):
            function(**GOOD)


def text(**changes: Any) -> dict[str, Any]:
    q, k, v = (GOOD[name] for name in "qkv")
    return {"q": q, "k": k, "v": v, "where": neighborhood((4, 6), 3), **changes}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (text(where=3), "where must be a Neighborhood or a Window, got int"),
        (text(where=neighborhood((6, 4), 3)), r"grid of \(6, 4\) tokens, got q on .* \(4, 6\)"),
        (text(where=disc_window((4, 5), 3)), r"grid of \(1, 4, 5\) tokens, got q on .* \(4, 6\)"),
        (text(where=neighborhood((4,), 3)), r"q must have the axes \[batch, length, heads"),
        (text(q=zeros(4, 6), where=disc_window((4, 6), 3)), "q must have the axes"),
        (text(q=3, where=disc_window((4, 6), 3)), "q must be a tensor, got int"),
        (text(extra_k=zeros(2, 1, 2, 3)), "extra_k without extra_v"),
        (text(global_q=zeros(2, 1, 2, 3)), r"global_q must have the shape \(2, 1, 4, 3\)"),
        (text(global_q=zeros(1, 1, 4, 3)), r"global_q .* got \(1, 1, 4, 3\)"),
        (text(global_q=zeros(2, 4, 3)), "global_q must have the axes"),
        (text(global_q=zeros(2, 1, 4, 3).half()), "global_q must have the dtype of q"),
    ],
)
def test_bad_arguments_of_grid_attention(given: dict[str, Any], words: str) -> None:
    with pytest.raises(MethodError, match=words):
        grid_attention(**given)


def test_backends_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendUnavailable, match="na2d has the backends .*, got 'cuda' from back"):
        na2d(**GOOD, backend="cuda")
    with pytest.raises(BackendUnavailable, match="na2d cannot run on triton, which backend asks"):
        na2d(**{name: x.double() if name in "qkv" else x for name, x in GOOD.items()},
             backend="triton")  # fmt: skip
    # the function of the same name hides the module
    module = importlib.import_module("vistoken.kernels.grid_attention")
    monkeypatch.setattr(module, "_TRITON_INSTALLED", False)
    with pytest.raises(BackendUnavailable, match="triton is not installed"):
        na2d(**GOOD, backend="triton")
