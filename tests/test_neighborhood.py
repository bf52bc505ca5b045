"""na1d, na2d, na3d and grid_attention: their meaning, their gradients, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vistoken.kernels import disc_window, grid_attention, na1d, na2d, na3d, neighborhood
from window_sets import visible

NA = {1: na1d, 2: na2d, 3: na3d}
EXACT = ("reference", "tiled")
FP64 = torch.float64


def draw(*shape: int, dtype: torch.dtype = FP64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


def qkv(*grid: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = FP64) -> list[Tensor]:
    """q, k [2, *grid, heads, 3] and v [2, *grid, heads, 5] that ask for gradients."""
    sizes = ((heads, 3), (kv_heads, 3), (kv_heads, 5))
    return [draw(2, *grid, *size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One head and one query after the other: [B, M, Hq, Dv] and [B, M, Hq]."""
    outs, lses = [], []
    for h in range(q.shape[2]):
        kv = h // (q.shape[2] // k.shape[2])
        for m, row in enumerate(mask):
            logits = (k[:, row, kv] @ q[:, m, h, :, None])[..., 0] * scale
            weights = logits.exp()
            outs.append((weights[..., None] * v[:, row, kv]).sum(1) / weights.sum(1)[:, None])
            lses.append(weights.sum(1).log())
    shape = (q.shape[2], len(mask))
    out, lse = (torch.stack(x, 1).unflatten(1, shape).transpose(1, 2) for x in (outs, lses))
    return out, lse


def worst(found: Any, wanted: Any) -> float:
    pairs = list(zip(found, wanted, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).detach().abs().max()) if a.numel() else 0.0 for a, b in pairs)


# --- the definition ------------------------------------------------------------------------------

CASES = [
    ((7,), (3,), (1,), (1,), (False,)),
    ((11,), (2,), (2,), (4,), (True,)),
    ((5, 6), (2, 6), (2, 1), (1, 1), (False, False)),
    ((5, 7), (2, 3), (1, 3), (2, 2), (False, True)),
    ((3, 4, 5), (1, 2, 4), (1, 2, 3), (3, 1, 1), (False, False, False)),
    ((4, 3, 4), (2, 3, 2), (1, 1, 2), (1, 1, 2), (True, False, False)),
]


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("options", CASES)
def test_equals_attention_one_query_at_a_time(backend: str, options: tuple) -> None:
    """Outputs, lse and all gradients, with text that is seen by and sees everything."""
    grid, *_ = options
    inputs = qkv(*grid)
    inputs += [draw(2, 3, 2, 3), draw(2, 3, 2, 5), draw(2, 2, 4, 3, seed=1)]
    q, k, v, extra_k, extra_v, global_q = inputs
    found = grid_attention(
        q, k, v, neighborhood(*options), scale=0.7, extra_k=extra_k, extra_v=extra_v,
        global_q=global_q, backend=backend,
    )  # fmt: skip
    tokens = math.prod(grid)
    mask = torch.ones(tokens + 2, tokens + 3, dtype=torch.bool)
    mask[:tokens, :tokens] = visible(*options)
    flat = [x.flatten(1, -3) for x in (q, k, v)]
    keys, values = torch.cat([flat[1], extra_k], 1), torch.cat([flat[2], extra_v], 1)
    out, lse = dense(torch.cat([flat[0], global_q], 1), keys, values, mask, 0.7)
    wanted = (
        out[:, :tokens].unflatten(1, grid),
        lse[:, :tokens].unflatten(1, grid),
        out[:, tokens:],
        lse[:, tokens:],
    )
    assert worst(found, wanted) < 1e-13
    weights = [draw(*x.shape, seed=9).detach() for x in wanted]
    grads = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(y, weights, strict=True)), inputs)
        for y in (found, wanted)
    ]
    assert worst(*grads) < 1e-12


@pytest.mark.parametrize("backend", EXACT)
def test_public_functions_pass_everything_on(backend: str) -> None:
    for options in CASES:
        grid, *rest = options
        q, k, v = qkv(*grid)
        extra_k, extra_v = draw(2, 3, 2, 3), draw(2, 3, 2, 5)
        out, lse = NA[len(grid)](
            q, k, v, *rest, scale=-0.4, additional_keys=extra_k, additional_values=extra_v,
            return_lse=True, backend=backend,
        )  # fmt: skip
        wanted = grid_attention(
            q, k, v, neighborhood(*options), scale=-0.4, extra_k=extra_k, extra_v=extra_v,
            backend="reference",
        )  # fmt: skip
        assert wanted[2:] == (None, None)
        assert worst((out, lse), wanted[:2]) < 1e-13
        alone = NA[len(grid)](q, k, v, *rest, scale=-0.4, backend=backend)
        assert alone.shape == out.shape and (alone - out).abs().max() > 1e-3


@pytest.mark.parametrize("backend", EXACT)
def test_probes_count_the_keys(backend: str) -> None:
    """With logits of 0 the output is the mean of what marks the keys, and the lse their log."""
    for options in CASES:
        grid, *rest = options
        tokens = math.prod(grid)
        zeros = torch.zeros(1, *grid, 1, 2)
        marks = torch.eye(tokens).reshape(1, *grid, 1, tokens)
        out, lse = NA[len(grid)](zeros, zeros, marks, *rest, return_lse=True, backend=backend)
        seen = visible(*options)
        counts = seen.sum(-1)
        assert torch.equal(out.reshape(tokens, tokens) != 0, seen)
        assert (out.reshape(tokens, tokens) * counts[:, None] - seen.float()).abs().max() < 1e-6
        assert (lse.flatten().exp() - counts).abs().max() < 1e-4


def test_discs() -> None:
    q, k, v = qkv(4, 5)
    for radius in (1, 2, 3, 9):
        window = disc_window((4, 5), radius)
        flat = [x.flatten(1, 2) for x in (q, k, v)]
        out, lse = dense(*flat, window.visible(), 3**-0.5)
        wanted = (out.unflatten(1, (4, 5)), lse.unflatten(1, (4, 5)))
        for backend in EXACT:
            assert worst(grid_attention(q, k, v, window, backend=backend)[:2], wanted) < 1e-13


# --- what must come to the same ------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    flat = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
    out = scaled_dot_product_attention(*flat, enable_gqa=True, **options)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


@pytest.mark.parametrize("backend", EXACT)
def test_windows_of_the_whole_grid_are_dense_attention(backend: str) -> None:
    for grid in ((9,), (4, 5), (2, 3, 4)):
        q, k, v = qkv(*grid, dtype=torch.float32)
        out = NA[len(grid)](q, k, v, grid, stride=grid, backend=backend)
        assert (out - sdpa(q, k, v)).abs().max() < 1e-6
    q, k, v = qkv(9, dtype=torch.float32)
    out = na1d(q, k, v, 9, is_causal=True, backend=backend)
    assert (out - sdpa(q, k, v, is_causal=True)).abs().max() < 1e-6
    assert torch.equal(na1d(q, k, v, 1, backend=backend), v.repeat_interleave(2, -2))


@pytest.mark.parametrize("backend", EXACT)
def test_a_stride_of_the_window_is_attention_in_blocks(backend: str) -> None:
    q, k, v = qkv(4, 6, dtype=torch.float32)

    def blocks(x: Tensor) -> Tensor:
        return x.unflatten(2, (2, 3)).unflatten(1, (2, 2)).transpose(2, 3).flatten(0, 2)

    out = na2d(q, k, v, (2, 3), stride=(2, 3), backend=backend)
    assert (blocks(out) - sdpa(*map(blocks, (q, k, v)))).abs().max() < 1e-6


@pytest.mark.parametrize("backend", EXACT)
def test_dilation_is_attention_on_each_slice(backend: str) -> None:
    q, k, v = qkv(7, 9)
    out = na2d(q, k, v, (2, 3), (2, 1), (3, 2), (False, True), backend=backend)
    for i in range(3):
        for j in range(2):
            part = [x[:, i::3, j::2] for x in (q, k, v)]
            alone = na2d(*part, (2, 3), (2, 1), 1, (False, True), backend=backend)
            assert (out[:, i::3, j::2] - alone).abs().max() < 1e-13


def test_many_global_queries_and_few_keys() -> None:
    """More queries that see all than there are keys; with dilation they take calls of their own."""
    q, k, v = qkv(2, 4)
    global_q = draw(2, 21, 4, 3)
    both = [
        grid_attention(q, k, v, neighborhood((2, 4), 1, 1, d), global_q=global_q)[2:]
        for d in (1, 2)
    ]
    assert both[0][0].shape == (2, 21, 4, 5)
    assert worst(*both) < 1e-13
    none = grid_attention(q, k, v, neighborhood((2, 4), 1, 1, 2), global_q=global_q[:, :0])
    assert none[2].shape == (2, 0, 4, 5) and none[3].shape == (2, 0, 4)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dilation", [1, 2])
def test_memory_layout_does_not_matter(backend: str, dilation: int) -> None:
    plain = [x.detach() for x in qkv(4, 6, kv_heads=1)]
    wanted = na2d(*plain, 2, 1, dilation, backend=backend)
    assert wanted.is_contiguous()
    wide = [torch.full((*x.shape[:-1], 9), math.nan, dtype=FP64) for x in plain]
    sliced = [room[..., 1 : 1 + x.shape[-1]].copy_(x) for room, x in zip(wide, plain, strict=True)]
    heads_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in plain]
    last_first = [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in plain]
    for given in (sliced, heads_first, last_first):
        out = na2d(*given, 2, 1, dilation, backend=backend)
        assert worst([out], [wanted]) < 1e-14
    many = [x.expand(-1, -1, -1, 4, -1) for x in plain[1:]]
    out = na2d(plain[0], *many, 2, 1, dilation, backend=backend)
    assert worst([out], [wanted]) < 1e-14


@pytest.mark.parametrize("backend", EXACT)
def test_nothing_there_is_nothing(backend: str) -> None:
    q, k, v = (x[:0].detach().requires_grad_() for x in qkv(4, 6))
    for dilation in (1, 2):
        out, lse = na2d(q, k, v, 2, 1, dilation, return_lse=True, backend=backend)
        assert out.shape == (0, 4, 6, 4, 5) and lse.shape == (0, 4, 6, 4)
        grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
        assert [g.shape for g in grads] == [x.shape for x in (q, k, v)]
    q, k, v = qkv(4, 6)
    extra = {"additional_keys": draw(2, 0, 2, 3), "additional_values": draw(2, 0, 2, 5)}
    out = na2d(q, k, v, 2, **extra, backend=backend)
    assert torch.equal(out, na2d(q, k, v, 2, backend=backend))
    grads = torch.autograd.grad(out.sum(), extra.values())
    assert [g.shape for g in grads] == [(2, 0, 2, 3), (2, 0, 2, 5)]


def test_scales() -> None:
    q, k, v = qkv(6)
    assert worst([na1d(q, k, v, 3)], [na1d(q, k, v, 3, scale=3**-0.5)]) == 0
    out, lse = na1d(q, k, v, 3, scale=0, return_lse=True)
    assert (lse - math.log(3)).abs().max() < 1e-14
    assert (out[:, 1, 0] - v[:, :3, 0].mean(1)).abs().max() < 1e-14
    assert worst([na1d(q, k, v, 3, scale=-2)], [na1d(-q, k, v, 3, scale=2.0)]) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, FP64])
def test_dtypes(dtype: torch.dtype) -> None:
    plain = [x.detach().to(dtype) for x in qkv(4, 6)]
    exact = na2d(*(x.double() for x in plain), 3, return_lse=True)
    for backend in EXACT:
        for device in ("none", "cpu"):
            with torch.autocast("cpu", torch.bfloat16, enabled=device == "cpu"):
                out, lse = na2d(*plain, 3, return_lse=True, backend=backend)
            assert out.dtype == dtype
            assert lse.dtype == (FP64 if dtype == FP64 else torch.float32)
            assert (
                worst([out.double()], [exact[0].to(dtype).double()]) <= 6 * torch.finfo(dtype).eps
            )
            assert worst([lse.double()], exact[1:]) < 2e-6


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dilation", [1, 2])
def test_gradcheck(backend: str, dilation: int) -> None:
    where = neighborhood((2, 5), (1, 2), (1, 2), dilation, (False, True))
    inputs = [draw(1, 2, 5, 2, 2), draw(1, 2, 5, 1, 2), draw(1, 2, 5, 1, 1)]
    inputs += [draw(1, 1, 1, 2), draw(1, 1, 1, 1), draw(1, 1, 2, 2)]

    def call(q: Tensor, k: Tensor, v: Tensor, *text: Tensor) -> Any:
        names = dict(zip(("extra_k", "extra_v", "global_q"), text, strict=True))
        return grid_attention(q, k, v, where, **names, backend=backend)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("dilation", [1, 2])
def test_only_what_asks_gets_a_gradient(backend: str, dilation: int) -> None:
    everything = qkv(4, 6)
    out, lse = na2d(*everything, 2, 1, dilation, return_lse=True, backend=backend)
    wanted = torch.autograd.grad(out.sin().sum() + lse.sum(), everything)
    for i in range(3):
        given = [x if i == j else x.detach() for j, x in enumerate(everything)]
        out, lse = na2d(*given, 2, 1, dilation, return_lse=True, backend=backend)
        (grad,) = torch.autograd.grad(out.sin().sum() + lse.sum(), given[i])
        assert worst([grad], wanted[i : i + 1]) < 1e-14
    only = na2d(*everything, 2, 1, dilation, return_lse=True, backend=backend)[1]
    (dv,) = torch.autograd.grad(only.sum(), everything[2], materialize_grads=True)
    assert (dv == 0).all()


# --- the operator and torch.compile --------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("tiled", False), ("tiled", True), ("reference", False)]
)
def test_compiles_as_one_graph(backend: str, dynamic: bool) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, text: Tensor) -> Any:
        extra = {"additional_keys": text, "additional_values": text[..., :1].expand(-1, -1, -1, 5)}
        out, lse = na2d(
            q * 2, k, v, (2, 1), 1, (2, 1), (True, False), **extra, return_lse=True,
            backend=backend,
        )  # fmt: skip
        return out + 1, lse

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for grid in ((4, 6), (5, 3))[: 1 + dynamic]:
        inputs = [*qkv(*grid), draw(2, 3, 2, 3)]
        results = [function(*inputs) for function in (compiled, layer)]
        assert worst(*results) < 1e-14
        grads = [torch.autograd.grad(o.sin().sum() + e.sum(), inputs) for o, e in results]
        assert worst(*grads) < 1e-13


@pytest.mark.parametrize("text", [False, True])
def test_operator_keeps_its_promises(text: bool) -> None:
    """Schema, fake tensors, autograd and ahead-of-time dispatch."""
    from vistoken.kernels import grid_operator
    from vistoken.kernels.windows import flatten_window

    ((_, window),) = neighborhood((3, 4), 2, 1, 1, (True, False)).groups()
    inputs = [x.unsqueeze(1).detach().requires_grad_() for x in qkv(3, 4)]
    others = [draw(2, 3, 2, 3), draw(2, 3, 2, 5), draw(2, 2, 4, 3)] if text else [None] * 3
    call = ("tiled", *inputs, flatten_window(window), 0.5, *others)
    torch.library.opcheck(torch.ops.vistoken.grid_attention, call)
    assert grid_operator.forward("tiled", *inputs, window, 0.5, *others)[2] is None or text
    plain = [x.detach() if isinstance(x, Tensor) else x for x in call]
    results = torch.ops.vistoken.grid_attention(*plain)
    grads = (results[0] + 1, results[1] if text else None, None, None)
    torch.library.opcheck(torch.ops.vistoken.grid_attention_backward, (*grads, *plain, *results))


def test_triton_as_an_operator() -> None:
    """The way from the public function to the kernels and back; their arithmetic has own tests."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = [draw(1, 3, 4, 2, 4, dtype=torch.float32, seed=i).to(device) for i in range(3)]
    inputs = [*drawn, draw(1, 2, 2, 4, dtype=torch.float32).to(device)]
    q, k, v, text = (x.detach().requires_grad_() for x in inputs)
    where = neighborhood((3, 4), 2, 1, (1, 2), (True, False))

    def run(backend: str) -> Any:
        return grid_attention(
            q, k, v, where, extra_k=text, extra_v=text, global_q=text, backend=backend
        )

    results = [run(backend) for backend in ("triton", "reference")]
    assert worst(*results) < 1e-5
    assert results[0][0].grad_fn is not None and results[0][1].dtype == torch.float32
    grads = [torch.autograd.grad(sum(x.sin().sum() for x in r), (q, k, v, text)) for r in results]
    assert worst(*grads) < 1e-5
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert worst(compiled("triton"), results[0]) == 0
