"""What every backend of grid attention is held to: one function for each kind of evidence.

All of them raise AssertionError. `Call` is how they reach the operation.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dense_oracle import BUDGETS, Limit
from kernel_cases import Case, Inputs, make_grads, make_inputs, solve, visible
from vistoken import kernels
from vistoken.kernels import disc_window, grid_attention, neighborhood

Outputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
NAMES = ("out", "lse", "global_out", "global_lse")


def call(case: Case, inputs: Inputs, backend: str | None) -> Outputs:
    """Run the case through `grid_attention`, or through the public function where that takes it."""
    q, k, v, extra_k, extra_v, global_q = inputs
    if case.seed % 2 and case.globals is None and not case.radius:
        public: Any = getattr(kernels, f"na{len(case.grid)}d")
        options = (case.kernel_size, case.stride, case.dilation, case.is_causal)
        out, lse = public(
            q, k, v, *options, scale=case.scale, additional_keys=extra_k,
            additional_values=extra_v, return_lse=True, backend=backend,
        )  # fmt: skip
        return out, lse, None, None
    if case.radius:
        where: Any = disc_window(case.grid, case.radius)
    else:
        where = neighborhood(
            case.grid, case.kernel_size, case.stride, case.dilation, case.is_causal
        )
    return grid_attention(
        q, k, v, where, scale=case.scale, extra_k=extra_k, extra_v=extra_v, global_q=global_q,
        backend=backend,
    )  # fmt: skip


def gradients(
    case: Case, inputs: Inputs, outputs: Outputs, grads: list[Tensor | None]
) -> dict[str, Tensor | None]:
    """Gradients of the inputs that the case wants some for; None where none came."""
    leaves = inputs.leaves(case)
    reached = [i for i, x in enumerate(outputs) if x is not None and x.requires_grad]
    reached = [i for i in reached if grads[i] is not None]
    found = torch.autograd.grad(
        [outputs[i] for i in reached],
        list(leaves.values()),
        [grads[i] for i in reached],
        allow_unused=True,
    )
    return dict(zip(leaves, found, strict=True))


def check_case(case: Case, backend: str | None, device: str, dtype: torch.dtype) -> None:
    """Results and gradients lie within the dtype's budget of fp64; inputs stay as they are."""
    inputs = make_inputs(case, device, dtype)
    before = inputs.map(Tensor.clone)
    inputs.leaves(case)
    outputs = call(case, inputs, backend)
    grads = make_grads(case, outputs)
    found = gradients(case, inputs, outputs, grads)
    for name, old, now in zip(Inputs._fields, before, inputs, strict=True):
        assert old is None or torch.equal(old, now), f"{name} was written to: {case}"
    judge = _Judge(case, inputs, grads)
    judge.outputs(outputs)
    for name, grad in found.items():
        judge.gradient(name, grad)


def check_forward(case: Case, backend: str | None, device: str, dtype: torch.dtype) -> None:
    """As `check_case`, without gradients."""
    inputs = make_inputs(case, device, dtype)
    with torch.no_grad():
        _Judge(case, inputs).outputs(call(case, inputs, backend))


class _Judge:
    """Holds the results of a case next to fp64."""

    def __init__(
        self, case: Case, inputs: Inputs, grads: list[Tensor | None] | None = None
    ) -> None:
        self.case = case
        dtype = inputs.q.dtype
        self.wanted = solve(case, inputs, grads)
        self.dense = None if dtype in BUDGETS else solve(case, inputs, grads, low=True)
        rows = case.batch * case.heads * (math.prod(case.grid) + (case.globals or 0))
        self.limit = Limit(dtype, rows, self.wanted.largest_logit)

    def outputs(self, found: Outputs) -> None:
        for i, (name, x, exact) in enumerate(zip(NAMES, found, self.wanted.outputs, strict=True)):
            name = f"{name} of {self.case}"
            assert (x is None) == (exact is None), name
            if x is None or exact is None:
                continue
            if i % 2:
                self.limit.check_lse(name, x, exact)
            else:
                dense = None if self.dense is None else self.dense.outputs[i]
                self.limit.check_result(name, x, exact, dense)

    def gradient(self, name: str, found: Tensor | None) -> None:
        exact = self.wanted.grads[name]
        if found is None and not exact.numel():
            return
        label = f"the gradient of {name} of {self.case}"
        assert found is not None, label
        dense = None if self.dense is None else self.dense.grads[name]
        self.limit.check_gradient(label, found, exact, dense, self.wanted.parts[name])


# --- exact evidence ------------------------------------------------------------------------------


def check_coordinates(case: Case, backend: str | None, device: str, dtype: torch.dtype) -> None:
    """With equal logits a result is the mean of the values seen: those name keys, so count them.

    The values are one-hot codes of the keys' coordinates, one axis after the other.
    """
    grid = case.grid
    codes = torch.cat(
        [
            torch.eye(length)[torch.arange(length)]
            .view([-1 if a == axis else 1 for a in range(len(grid))] + [length])
            .expand(*grid, length)
            for axis, length in enumerate(grid)
        ],
        -1,
    )
    plain = replace(case, batch=1, heads=1, kv_heads=1, extra=None, globals=None, seed=0)
    q = torch.zeros(1, *grid, 1, case.dim, device=device, dtype=dtype)
    v = codes[None, ..., None, :].to(device, dtype)
    with torch.no_grad():
        out, lse, *_ = call(plain, Inputs(q, q, v, None, None, None), backend)
    seen = visible(case).double()
    counts = lse.double().exp().flatten().cpu()
    assert torch.equal(counts.round(), seen.sum(-1)), f"keys seen: {case}"
    sums = out.double().flatten(0, -2).cpu() * seen.sum(-1, keepdim=True)
    assert torch.equal(sums.round(), seen @ codes.flatten(0, -2).double()), f"which keys: {case}"
    assert (sums - sums.round()).abs().max() < 0.2, f"sums of ones: {case}"


def check_poison(
    case: Case, backend: str | None, device: str, dtype: torch.dtype, queries: list[int]
) -> None:
    """K = NaN and V = 1e4 at every key that a query does not see leave its result as it is.

    queries: their places; each is an entry of one batch, with a poison of its own.
    """
    plain = replace(case, batch=1, layouts=("plain",) * 3, globals=None)
    inputs = make_inputs(plain, device, dtype)
    seen = visible(case).to(device)[queries].view(len(queries), *case.grid, 1, 1)
    many = inputs.map(lambda x: x.repeat(len(queries), *[1] * (x.dim() - 1)))
    bad = many._replace(k=many.k.masked_fill(~seen, math.nan), v=many.v.masked_fill(~seen, 1e4))
    with torch.no_grad():
        clean, poisoned = (call(plain, x, backend)[:2] for x in (many, bad))
    for name, one, other in zip(NAMES, clean, poisoned, strict=False):
        for entry, place in enumerate(queries):
            x, y = (z[entry].flatten(0, len(case.grid) - 1)[place] for z in (one, other))
            assert torch.equal(x, y), f"{name} of query {place}: {x} became {y}: {case}"


def check_reach(case: Case, backend: str | None, device: str, dtype: torch.dtype) -> None:
    """A gradient that arrives at one query reaches the keys it sees, and no other, exactly.

    Every query in turn, as an entry of one batch.
    """
    rank, tokens = len(case.grid), math.prod(case.grid)
    plain = replace(case, batch=1, layouts=("plain",) * 3, globals=None, scale=0.1)
    inputs = make_inputs(plain, device, dtype)
    many = inputs.map(lambda x: x.repeat(tokens, *[1] * (x.dim() - 1)).requires_grad_())
    out = call(plain, many, backend)[0]
    d_out = torch.zeros_like(out).flatten(1, rank)
    d_out[torch.arange(tokens), torch.arange(tokens)] = 1.0
    found = torch.autograd.grad(out, [many.q, many.k, many.v], d_out.view_as(out))
    reached = [x.flatten(1, rank).abs().sum((-1, -2)).cpu() != 0 for x in found]
    seen = visible(case)
    assert torch.equal(reached[2], seen), f"values that get a gradient: {case}"
    assert not (reached[1] & ~seen).any(), f"keys that get a gradient: {case}"
    assert not (reached[0] & ~torch.eye(tokens, dtype=torch.bool)).any(), f"queries: {case}"


def check_repeats(case: Case, backend: str | None, device: str, dtype: torch.dtype) -> None:
    """Two runs give the same bits, forward and backward."""
    runs = []
    for _ in range(2):
        inputs = make_inputs(case, device, dtype)
        inputs.leaves(case)
        outputs = call(case, inputs, backend)
        grads = gradients(case, inputs, outputs, make_grads(case, outputs))
        runs.append([*outputs, *grads.values()])
    for one, other in zip(*runs, strict=True):
        assert (one is None and other is None) or torch.equal(one, other), f"two runs: {case}"
