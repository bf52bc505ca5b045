"""What a model pruned before the LLM must satisfy before a benchmark times it.

The oracle takes another way than the library: it picks the features out by hand, writes the
shortened prompt in plain Python lists, and gives both to the bare model as `inputs_embeds`. For
methods that merge tokens, or act inside the tower or the LLM, see `bench_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vistoken.errors import DataError
from vistoken.eval.bench_models import Inputs, borders
from vistoken.eval.bench_variants import Variant
from vistoken.eval.timing import CheckFailed
from vistoken.pruning import pooling

# Largest relative distance of logits at one position. Both ways run the same operations on the
# same numbers, so fp32 must be exact. In half precision, one rounding that falls otherwise grows
# to some percent through the layers of a random model; a wrong token gives more than 100 %.
BUDGETS = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 0.0}


@dataclass(frozen=True)
class Agreement:
    """Relative distances ‖pruned - reference‖ / ‖reference‖ of logits, the worst of all positions.

    logits: of the prefill. decode: of one step after it. control: of a result that is wrong for
    sure (of the oracle: each feature is its neighbour's), which the budget must tell from the
    right one. kept: the report's indices, one list per picture. reference: what was compared with.
    """

    logits: float
    decode: float
    control: float
    budget: float
    kept: list[list[int]]
    reference: str = "oracle"

    def to_dict(self) -> dict[str, Any]:
        """Return the reference, the distances and the budget."""
        names = ("reference", "logits", "decode", "control", "budget")
        return {name: getattr(self, name) for name in names}


@torch.no_grad()
def compare_with_oracle(model: Any, inputs: Inputs, variant: Variant, keep: int) -> Agreement:
    """Check one configuration against the oracle; `model` is bare before and after.

    Raises `CheckFailed` if the report counts wrong, if the prefill's or a decode step's logits
    lie outside the budget, or if wrong tokens would have passed as well.
    """
    with variant.attach(model, keep) as attachment:
        out = model(**inputs, use_cache=True)
        report = attachment.report()
        token = out.logits[:, -1:].argmax(-1)
        # a decode loop written against the long prompt: its mask has the long length
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = model(input_ids=token, past_key_values=out.past_key_values, attention_mask=mask)
    kept = [indices.tolist() for indices in report.kept]
    check_kept(kept, keep, len(inputs["pixel_values"]), visual_tokens(inputs, model))

    vision = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    encoded = model.get_image_features(**vision, return_dict=True)
    features = torch.stack(list(encoded.pooler_output))
    right = _oracle(model, inputs, kept, _chosen(features, kept, variant), token)
    wrong = _chosen(features.roll(1, dims=1), kept, variant)
    control = _oracle(model, inputs, kept, wrong, token)
    found = Agreement(
        logits=distance(out.logits, right[0]),
        decode=distance(step.logits, right[1]),
        control=distance(control[0], right[0]),
        budget=BUDGETS[features.dtype],
        kept=kept,
    )
    check_agreement(found, variant, keep)
    return found


def distance(value: Tensor, reference: Tensor) -> float:
    """Return the largest ‖value - reference‖ / ‖reference‖ over the last axis; NaN stays NaN."""
    if value.shape != reference.shape:
        raise CheckFailed(
            f"logits of shape {list(value.shape)} where {list(reference.shape)} was expected"
        )
    value, reference = value.float(), reference.float()
    norm = reference.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return float(((value - reference).norm(dim=-1) / norm).max())


def check_kept(kept: list[list[int]], keep: int, images: int, tokens: int) -> None:
    """Raise `CheckFailed` unless each of `images` lists holds `keep` ascending indices."""
    counts = [len(indices) for indices in kept]
    if counts != [keep] * images:
        raise CheckFailed(f"the report counts {counts} kept tokens, not {keep} of {images} images")
    for indices in kept:
        ascending = all(a < b for a, b in zip(indices, indices[1:], strict=False))
        if not ascending or indices[0] < 0 or indices[-1] >= tokens:
            raise CheckFailed(f"kept indices are not ascending within 0..{tokens - 1}: {indices}")


def check_agreement(found: Agreement, variant: Variant, keep: int) -> None:
    """Raise `CheckFailed` if a distance lies outside the budget, or the control within twice it."""
    name = f"{variant.label} at {keep} tokens"
    for what in ("logits", "decode"):
        value = getattr(found, what)
        if not value <= found.budget:
            raise CheckFailed(
                f"{name}: {what} differ from the {found.reference} by {value:.2e}, "
                f"budget {found.budget:.0e}"
            )
    if not found.control > 2 * found.budget:
        raise CheckFailed(
            f"{name}: the check is blind, wrong tokens differ by {found.control:.2e} only"
        )


def visual_tokens(inputs: Inputs, model: Any) -> int:
    """Placeholders of one picture in the prompt."""
    placeholders = int((inputs["input_ids"] == model.config.image_token_id).sum())
    return placeholders // len(inputs["pixel_values"])


def _chosen(features: Tensor, kept: list[list[int]], variant: Variant) -> Tensor:
    """The features [I, K, C] that should enter the LLM."""
    if not variant.merged:
        return torch.stack([image[indices] for image, indices in zip(features, kept, strict=True)])
    if variant.method != "pooling":
        raise DataError(f"there is no oracle for the merged tokens of {variant.method!r}")
    # the averages are checked here, where a sum in another order costs one rounding, not after
    # the LLM, which would let it grow
    side = int(features.shape[1] ** 0.5)
    grid, shape = (side, side), pooling.cells((side, side), len(kept[0]))
    pooled = pooling.pool(features, grid, shape)
    averages = _cell_weights(grid, shape).to(features.device) @ features.float()
    error = distance(pooled, averages)
    if not error <= 4 * torch.finfo(features.dtype).eps:
        raise CheckFailed(f"{variant.label}: pooled features are off by {error:.2e}")
    return pooled


def _cell_weights(grid: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """The matrix [K, N] that averages a grid into cells.

    Of s rows, cell i of n covers floor(i·s/n) up to, not including, ceil((i+1)·s/n).
    """

    def spans(size: int, parts: int) -> list[range]:
        return [range(i * size // parts, -(-(i + 1) * size // parts)) for i in range(parts)]

    down, across = spans(grid[0], shape[0]), spans(grid[1], shape[1])
    places = [(rows, cols) for rows in down for cols in across]
    weights = torch.zeros(len(places), grid[0] * grid[1])
    for cell, (rows, cols) in enumerate(places):
        for row in rows:
            for col in cols:
                weights[cell, row * grid[1] + col] = 1 / (len(rows) * len(cols))
    return weights


def _oracle(
    model: Any, inputs: Inputs, kept: list[list[int]], chosen: Tensor, token: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits [B, S, V] of the bare model on the prompt shortened by hand, and of one more token."""
    image_token = model.config.image_token_id
    short: list[list[int]] = []
    for ids, indices in zip(inputs["input_ids"].tolist(), kept, strict=True):
        stays, seen, row = set(indices), 0, []
        for word in ids:
            if word != image_token or seen in stays:
                row.append(word)
            seen += word == image_token
        short.append(row)
    short_ids = torch.tensor(short, device=inputs["input_ids"].device)
    embeds = model.get_input_embeddings()(short_ids)
    embeds[short_ids == image_token] = chosen.flatten(0, 1)
    mask = torch.ones_like(short_ids)
    out = model(inputs_embeds=embeds, attention_mask=mask, use_cache=True)
    step = model(input_ids=token, past_key_values=out.past_key_values)
    return out.logits, step.logits


@torch.no_grad()
def count_flops(model: Any, inputs: Inputs) -> dict[str, int]:
    """Return the FLOPs of a prefill to the first token, as `torch.utils.flop_counter` counts them.

    `total`, and of it `select`: what runs between the projector and the LLM, a method's own work.
    The counter knows the attention kernels of CUDA; the one of the CPU is added here with the same
    formula (all S × S products, a causal mask notwithstanding), and the batched product that is
    told its output's dtype, at which the counter fails.
    """
    from torch.utils.flop_counter import FlopCounterMode

    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten.bmm: _product_flops,
    }
    seen = {}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:

        def note(name: str) -> None:
            seen[name] = counter.get_total_flops()

        with borders(model, note):
            model(**inputs, logits_to_keep=1)
    return {"total": counter.get_total_flops(), "select": seen["llm"] - seen["select"]}


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _product_flops(left: torch.Size, right: torch.Size, *args: Any, **kwargs: Any) -> int:
    batch, rows, inner = left
    return 2 * batch * rows * inner * right[2]
