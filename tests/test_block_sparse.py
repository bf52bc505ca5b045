"""block_sparse_attention: by definition, gradients, operator contract, inputs, refusals."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from mask_cases import draw_list_inputs, list_results
from vistoken.errors import BackendUnavailable, MethodError
from vistoken.kernels import list_reference, merge_attentions, use_backend
from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.block_sparse import LIST_BACKENDS, block_sparse_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON = torch.tensor([[True, False, True], [False, False, False], [True, True, True]], device=DEVICE)


def tensors(
    s: int = 40, n: int = 36, heads: int = 2, kv_heads: int = 1, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """q, k, v for the map ON in blocks of 16, values wider than keys."""
    shapes = ((s, heads, 8), (n, kv_heads, 8), (n, kv_heads, 12))
    return [
        torch.randn(2, *shape, dtype=dtype, device=DEVICE, requires_grad=True) for shape in shapes
    ]


def same(found: Any, expected: Any, limit: float = 1e-12) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.allclose(a.cpu(), b.cpu(), 0, limit) for a, b in pairs)


# --- the definition ------------------------------------------------------------------------------


def slow(
    q: Tensor, k: Tensor, v: Tensor, on: Tensor, sees: Any, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One query at a time, from the map, the rule inside blocks of 16 and the valid keys."""
    q, k, v, on = (x.cpu() for x in (q, k, v, on))
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64)
    group = q.shape[2] // k.shape[2]
    on = on.expand(q.shape[0], q.shape[2], -1, -1)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                keys = [
                    j
                    for j in range(k.shape[1])
                    if on[b, h, i // 16, j // 16]
                    and sees(b, h, i, j)
                    and (lengths is None or j % 16 < lengths[b, j // 16])
                ]
                if not keys:
                    continue
                logits = scale * (k[b, keys, h // group].double() @ q[b, i, h].double())
                out[b, i, h] = logits.softmax(0) @ v[b, keys, h // group].double()
                lse[b, i, h] = logits.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
@pytest.mark.parametrize("heads", [1, 2])
def test_equals_one_query_at_a_time(backend: str, heads: int) -> None:
    def sees(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q * 5 + kv * 3 + h + b) % 4 != 1

    q, k, v = (x.detach().float() for x in tensors(heads=2, kv_heads=heads))
    on = torch.rand(2, 2, 3, 3) < 0.7
    on[:, :, 1] = False
    lengths = torch.tensor([[16, 3, 4], [7, 0, 1]])
    mask = BlockMask.from_map(on, 40, 36, 16, mask=sees, lengths=lengths, batch=2, heads=2)
    mask = mask.to(DEVICE)
    expected = slow(q, k, v, on, sees, lengths, 0.4)
    found = block_sparse_attention(q, k, v, mask, scale=0.4, return_lse=True, backend=backend)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert same((x.double() for x in found), expected, 2e-6)
    assert (found[0][:, 16:32] == 0).all() and (found[1][:, 16:32] == -math.inf).all()
    expected = slow(q, k, v, ON, sees, None, 8**-0.5)
    out = block_sparse_attention(q, k, v, ON, mask=sees, backend=backend)
    assert same([out.double()], expected[:1], 2e-6)


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
def test_keys_that_do_not_count_may_be_anything(backend: str) -> None:
    lengths = torch.tensor([[16, 3, 4], [7, 0, 1]], device=DEVICE)
    q, k, v = (x.detach().float() for x in tensors())
    mask = BlockMask.from_map(ON, 40, 36, 16, lengths=lengths)
    clean = list_results(
        lambda q, k, v: block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend),
        {"q": q, "k": k, "v": v},
    )
    counts = (torch.arange(16, device=DEVICE) < lengths[..., None]).flatten(1)[:, :36]
    for x in (k, v):
        x[~counts] = math.nan
    found = list_results(
        lambda q, k, v: block_sparse_attention(q, k, v, mask, return_lse=True, backend=backend),
        {"q": q, "k": k, "v": v},
    )
    for name, x in found.items():
        assert torch.equal(x, clean[name]), name
    assert not found["d_k"][~counts].any() and not found["d_v"][~counts].any()


def test_all_blocks_are_dense_attention() -> None:
    q, k, v = tensors(heads=3, kv_heads=3)
    out = block_sparse_attention(q, k, v, torch.ones_like(ON))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first)
    assert same([out], [dense.transpose(1, 2)])


def test_two_halves_merge_into_the_whole() -> None:
    """Disjoint block maps, one of them empty for some queries, are exact after a merge."""
    inputs = tensors()
    whole = block_sparse_attention(*inputs, ON, return_lse=True)
    left = ON & torch.tensor([True, False, False], device=DEVICE)
    parts = [block_sparse_attention(*inputs, part, return_lse=True) for part in (left, ON & ~left)]
    merged = merge_attentions(*map(list, zip(*parts, strict=True)))
    assert same(merged, whole)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out, _ in (whole, merged)]
    assert same(*grads)


@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_scale_zero_and_negative(backend: str) -> None:
    q, k, v = (x.detach().float() for x in tensors())
    for scale in (0.0, -0.7):
        run = (
            block_sparse_attention(q, k, v, ON, scale=scale, return_lse=True, backend=name)
            for name in (backend, "reference")
        )
        assert same(*run, limit=2e-6)


# --- gradients and the operator ------------------------------------------------------------------


def test_gradcheck_of_the_definition() -> None:
    mask = BlockMask.from_map(
        torch.ones(1, 2, dtype=torch.bool), 3, 18, 16, mask=lambda b, h, q, kv: kv % 5 < q
    )
    q, k, v = (torch.randn(1, n, h, 2).double() for n, h in ((3, 2), (18, 1), (18, 1)))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = list_reference.forward(q, k, v, mask, 0.7)
        return out, lse[:, 1:]

    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(attention, inputs)
    assert torch.autograd.gradgradcheck(attention, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
def test_gradcheck_of_the_operator() -> None:
    """In fp32, so with wide steps: the kernel has no fp64."""
    mask = BlockMask.from_map(
        torch.ones(1, 2, dtype=torch.bool), 3, 18, 16, mask=lambda b, h, q, kv: kv % 5 < q
    ).to(DEVICE)
    inputs = [
        torch.randn(1, n, h, 2, device=DEVICE, requires_grad=True)
        for n, h in ((3, 2), (18, 1), (18, 1))
    ]

    def attention(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = block_sparse_attention(
            *inputs, mask, scale=0.7, return_lse=True, backend="triton"
        )
        return out, lse[:, 1:]

    assert torch.autograd.gradcheck(
        attention, inputs, eps=0.02, atol=2e-3, rtol=2e-2, fast_mode=True, nondet_tol=0.0
    )


def test_operator_contract() -> None:
    pytest.importorskip("triton")
    from vistoken.kernels import list_operator

    mask = BlockMask.from_map(
        torch.ones(2, 1, 1, 2, dtype=torch.bool), 9, 20, 16,
        mask=lambda b, h, q, kv: (q + kv) % 3 > 0, lengths=torch.tensor([[16, 1], [3, 4]]),
    ).to(DEVICE)  # fmt: skip
    q, k, v = tensors(9, 20, dtype=torch.float32)
    lists = list_operator._flatten(mask, True)
    arguments = (q, k, v, lists, 16, 16, 0.3)
    operators = torch.ops.vistoken
    torch.library.opcheck(operators.block_sparse_attention.default, arguments)
    out, lse = (x.detach() for x in operators.block_sparse_attention(*arguments))
    q, k, v = (x.detach() for x in (q, k, v))
    torch.library.opcheck(
        operators.block_sparse_attention_backward.default,
        (out, lse, q, k, v, *arguments[3:], out, lse),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["map", "lists"])
def test_compiles_as_one_graph(backend: str, kind: str) -> None:
    inputs = tensors(dtype=torch.float32)
    given: Any = ON
    if kind == "lists":
        given = BlockMask.from_map(ON, 40, 36, mask=lambda b, h, q, kv: q != kv)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return block_sparse_attention(q, k, v, given, return_lse=True, backend=backend)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    runs = [f(*inputs) for f in (compiled, attention)]
    assert same(*runs, limit=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out, _ in runs]
    assert same(*grads, limit=1e-5)


def test_a_mask_is_refused_inside_compiled_code() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return block_sparse_attention(q, k, v, ON, mask=lambda b, h, q, kv: q != kv)

    with pytest.raises(Exception, match="cannot be asked inside compiled code"):
        torch.compile(attention, fullgraph=True, backend="eager")(*tensors())


# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
def test_strides_do_not_matter(backend: str) -> None:
    """Heads first, every other token, expanded over heads, a slice of a wider tensor."""
    q = torch.randn(2, 2, 40, 8, device=DEVICE).transpose(1, 2)
    k = torch.randn(2, 72, 1, 8, device=DEVICE)[:, ::2].expand(-1, -1, 2, -1)
    v = torch.randn(2, 36, 2, 24, device=DEVICE)[..., 1::2]
    assert not any(x.is_contiguous() for x in (q, k, v))

    def run(*inputs: Tensor) -> Tensor:
        return block_sparse_attention(*inputs, ON, backend=backend)

    assert same([run(q, k, v)], [run(*(x.contiguous() for x in (q, k, v)))], 1e-6)
    loss = run(q.requires_grad_(), k, v).sum()  # the gradient that arrives is expanded
    expected = block_sparse_attention(q, k, v, ON, backend="reference").sum()
    grads = (torch.autograd.grad(x, q) for x in (loss, expected))
    assert same(*grads, limit=1e-5)


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
def test_only_one_input_needs_a_gradient(backend: str) -> None:
    for i in range(3):
        inputs = [x.detach().float() for x in tensors()]
        inputs[i].requires_grad_()
        out = block_sparse_attention(*inputs, ON, backend=backend)
        expected = block_sparse_attention(*inputs, ON, backend="reference")
        grads = (torch.autograd.grad(x.square().sum(), inputs[i]) for x in (out, expected))
        assert same(*grads, limit=1e-5)


@pytest.mark.parametrize("backend", ["reference", "tiled", "triton"])
def test_nothing_to_do(backend: str) -> None:
    for batch, s, n in ((0, 20, 20), (2, 0, 20), (2, 20, 0)):
        on = torch.ones(-(-s // 16), -(-n // 16), dtype=torch.bool, device=DEVICE)
        inputs = [torch.randn(batch, x, 2, 4, device=DEVICE, requires_grad=True) for x in (s, n, n)]
        out, lse = block_sparse_attention(*inputs, on, return_lse=True, backend=backend)
        assert out.shape == (batch, s, 2, 4) and not out.any()
        assert lse.shape == (batch, s, 2) and (lse == -math.inf).all()
        assert not any(x.any() for x in torch.autograd.grad(out.sum(), inputs))


def test_masks_and_maps_of_one_rule_agree() -> None:
    """A map per head, the same for each batch entry, and the lists made of it."""
    inputs = tensors()
    per_head = torch.stack([ON, ~ON])
    runs = [
        block_sparse_attention(*inputs, given)
        for given in (
            per_head,
            per_head.expand(2, -1, -1, -1),
            BlockMask.from_map(per_head, 40, 36),
            BlockMask.from_map(per_head, 40, 36, trim=False),
        )
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)
    assert not torch.allclose(runs[0], block_sparse_attention(*inputs, ON))


# --- backends and refusals -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_default_on_a_cpu_equals_the_definition(seed: int) -> None:
    inputs = draw_list_inputs(Random(seed), torch.float64)

    def run(backend: str | None) -> dict[str, Tensor]:
        def forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> Any:
            return block_sparse_attention(
                q, k, v, mask, scale=scale, return_lse=True, backend=backend
            )

        return list_results(forward, inputs)

    assert same(run(None).values(), run("reference").values())


def test_backends_asked_for_by_name_do_not_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors()
    assert LIST_BACKENDS == ("reference", "tiled", "flex", "triton")
    with pytest.raises(BackendUnavailable, match="float64; it takes float32, float16 and bfloat16"):
        block_sparse_attention(*inputs, ON, backend="triton")
    with pytest.raises(BackendUnavailable, match="reference, tiled, flex, triton, got 'natten'"):
        block_sparse_attention(*inputs, ON, backend="natten")
    with use_backend("triton"), pytest.raises(BackendUnavailable, match="use_backend asks for"):
        block_sparse_attention(*inputs, ON)
    monkeypatch.setenv("VISTOKEN_BACKEND", "triton")
    with pytest.raises(BackendUnavailable, match="VISTOKEN_BACKEND asks for"):
        block_sparse_attention(*inputs, ON)
    wide = [torch.randn(1, 16, 1, 260, device=DEVICE) for _ in range(3)]
    with pytest.raises(BackendUnavailable, match="head size is 260, at most 256"):
        block_sparse_attention(*wide, ON[:1, :1], backend="triton")


def test_bad_input_is_named() -> None:
    q, k, v = tensors()

    def refuses(match: str, *inputs: Any, **options: Any) -> None:
        with pytest.raises(MethodError, match=match):
            block_sparse_attention(*inputs, **options)

    refuses(r"q must have the axes \[batch, tokens, heads, channels\]", q[0], k, v, ON)
    refuses("k must have the dtype of q", q, k.float(), v, ON)
    refuses("v must have the shape", q, k, v[:, :-1], ON)
    refuses("k must have the shape", q, k[..., :-1], v, ON)
    refuses("multiple of the heads of k and v, got 3 heads", q[:, :, [0, 1, 0]], k[:, :, [0, 0]],
            v[:, :, [0, 0]], ON)  # fmt: skip
    refuses("at least one head and one channel", q[:, :, :0], k, v, ON)
    refuses("scale must be a finite number", q, k, v, ON, scale=math.nan)
    refuses("block_map must be a bool tensor or a BlockMask, got list", q, k, v, [[True]])
    refuses("4 query blocks, but 40 tokens", q, k, v, ON[[0, 1, 2, 2]])
    refuses("has 3 heads, q has 2", q, k, v, ON.expand(3, 3, 3))
    refuses("has 3 batch entries, q has 2", q, k, v, ON.expand(3, 1, 3, 3))
    lists = BlockMask.from_map(ON, 40, 36)
    refuses("of 40 queries and 36 keys, got 39 and 36", q[:, 1:], k, v, lists)
    refuses("a BlockMask holds its own", q, k, v, lists, mask=lambda b, h, q, kv: q > kv)
    refuses(f"is on meta and q on {q.device}", q, k, v, lists.to("meta"))
    three = BlockMask.from_map(ON, 40, 36, lengths=torch.ones(3, 3, device=DEVICE))
    refuses("has 3 rows of lengths, q has 2", q, k, v, three)
