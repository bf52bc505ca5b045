"""What a model must satisfy whose tokens merge, or leave inside the tower or the LLM.

No prompt written by hand can stand for these. Instead, the KV cache of every layer must have the
length that the report says, and a row of a batch must give what it gives alone. A cut inside the
LLM that keeps positions and merges nothing must equal the bare model whose later layers do not see
the dropped columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import vistoken
from vistoken.eval.bench_checks import (
    BUDGETS,
    Agreement,
    check_agreement,
    check_kept,
    compare_with_oracle,
    distance,
    visual_tokens,
)
from vistoken.eval.bench_models import Inputs
from vistoken.eval.bench_variants import Variant
from vistoken.eval.timing import CheckFailed

IN_LLM = "LLM_LAYER"
IN_TOWER = ("VISION_BLOCK", "VISION_LAYER")
# sums of a batch and of a row alone go in another order; fp32 is left some roundings
ROW_BUDGETS = {**BUDGETS, torch.float32: 1e-4}


def places(attachment: vistoken.Attachment) -> list[str]:
    """Where the attached methods act: names of places such as `PROJECTED` or `LLM_LAYER`."""
    return sorted({stage.place.name for stage in attachment.stages})


def check_variant(
    model: Any, inputs: Inputs, variant: Variant, keep: int, several: Inputs
) -> Agreement:
    """Check one configuration by the strictest way there is for it; `model` is bare.

    `several` has at least two rows, for methods that are compared with single rows. Raises
    `CheckFailed`.
    """
    with variant.attach(model, keep) as attachment:
        where = places(attachment)
    if where == ["PROJECTED"] and (not variant.merged or variant.method == "pooling"):
        return compare_with_oracle(model, inputs, variant, keep)
    return compare_rows(model, several, variant, keep)


@torch.no_grad()
def compare_rows(model: Any, inputs: Inputs, variant: Variant, keep: int) -> Agreement:
    """Check that row 0 of a batch keeps the tokens and gives the logits that it does alone.

    In half precision "alone" is a batch of copies of it. Products of other shapes round otherwise,
    and among the nearly equal scores of a random model that changes which tokens are kept; copies
    are of the same shape. The control is row 1, which must be far from row 0.
    """
    rows = len(inputs["input_ids"])
    copies = 1 if model.dtype == torch.float32 else rows
    alone = {name: value[[0] * copies] for name, value in inputs.items()}
    with variant.attach(model, keep) as attachment:
        batch, token, kept = _run(model, inputs, attachment, keep, None)
        single, _, single_kept = _run(model, alone, attachment, keep, token[[0] * copies])
    if kept[0] != single_kept[0]:
        raise CheckFailed(f"{variant.label} at {keep} tokens: a row keeps other tokens than alone")
    found = Agreement(
        logits=distance(batch[0][:1], single[0][:1]),
        decode=distance(batch[1][:1], single[1][:1]),
        control=distance(batch[0][1:2], batch[0][:1]),
        budget=ROW_BUDGETS[model.dtype],
        kept=kept,
        reference="row alone",
    )
    check_agreement(found, variant, keep)
    return found


@torch.no_grad()
def compare_with_masked_keys(
    model: Any, eager: Any, inputs: Inputs, variant: Variant, keep: int
) -> Agreement | None:
    """Check a single cut inside the LLM against hidden keys; None for another kind of method.

    eager: the same model with eager attention, whose layers behind the cut get a mask without the
    dropped columns. The control is the dense model.
    """
    with variant.attach(model, keep) as attachment:
        cuts = [stage.layer for stage in attachment.stages if stage.place.name == IN_LLM]
        if len(cuts) != 1 or variant.merged:
            return None
        pruned, token, kept = _run(model, inputs, attachment, keep, None)
    dense = _logits(eager, inputs, token)
    handles = _hide(eager, cuts[0], _dropped(inputs, kept, model.config.image_token_id))
    try:
        masked = _logits(eager, inputs, token)
    finally:
        for handle in handles:
            handle.remove()
    found = Agreement(
        logits=distance(pruned[0], masked[0]),
        decode=distance(pruned[1], masked[1]),
        control=distance(dense[0], masked[0]),
        budget=ROW_BUDGETS[model.dtype],
        kept=kept,
        reference="masked keys",
    )
    check_agreement(found, variant, keep)
    return found


def cache_fault(cache: Any, lengths: Sequence[int]) -> str | None:
    """Say in which layer a KV cache does not have the length it should have, or None."""
    if len(cache) != len(lengths):
        return f"the KV cache has {len(cache)} layers, the report {len(lengths)}"
    for layer, length in enumerate(lengths):
        cached = int(cache.get_seq_length(layer))
        if cached != length:
            return (
                f"the KV cache holds {cached} tokens in layer {layer}, the prompt should have "
                f"{length} there"
            )
    return None


def prompt_lengths(report: vistoken.Report, rows: int, text: int) -> list[int]:
    """The length of the prompt in each LLM layer, for rows of one picture and `text` words."""
    return [text + visual // rows for visual in report.layer_tokens]


def _run(
    model: Any, inputs: Inputs, attachment: vistoken.Attachment, keep: int, token: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Tensor, list[list[int]]]:
    """Last logits of prefill and step, the step's token, and what was kept; lengths are checked."""
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    report, rows = attachment.report(), len(inputs["input_ids"])
    total = visual_tokens(inputs, model)
    lengths = prompt_lengths(report, rows, inputs["input_ids"].shape[1] - total)
    if fault := cache_fault(out.past_key_values, lengths):
        raise CheckFailed(fault)
    method: Any = attachment.methods[0]  # a pruner, which can say how many tokens it leaves
    left = method.survivors(total, keep, attachment.host.facts)
    kept = [indices.tolist() for indices in report.kept]
    check_kept(kept, left, rows, total)
    if report.layer_tokens[-1] != left * rows:
        raise CheckFailed(
            f"{report.layer_tokens[-1]} tokens enter the last layer, of {rows} pictures {left} stay"
        )
    prefill = out.logits[:, -1:]
    token = prefill.argmax(-1) if token is None else token
    return (prefill, _step(model, inputs, out, token)), token, kept


def _logits(model: Any, inputs: Inputs, token: Tensor) -> tuple[Tensor, Tensor]:
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1:], _step(model, inputs, out, token)


def _step(model: Any, inputs: Inputs, out: Any, token: Tensor) -> Tensor:
    """Logits of one more token, in a loop written against the long prompt, as users write it."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    cache = out.past_key_values
    return model(input_ids=token, past_key_values=cache, attention_mask=mask).logits


def _dropped(inputs: Inputs, kept: list[list[int]], image_token: int) -> list[list[int]]:
    """The columns of each row's prompt whose visual tokens were dropped."""
    found = []
    for ids, indices in zip(inputs["input_ids"].tolist(), kept, strict=True):
        visual = [column for column, word in enumerate(ids) if word == image_token]
        stays = {visual[index] for index in indices}
        found.append([column for column in visual if column not in stays])
    return found


def _hide(model: Any, layer: int | None, dropped: list[list[int]]) -> list[Any]:
    """Hooks that hide each row's columns from all decoder layers behind `layer`."""

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].clone()
        for row, columns in enumerate(dropped):
            mask[row, :, :, columns] = torch.finfo(mask.dtype).min
            if mask.shape[2] == mask.shape[3]:  # a dropped row must see something; none reads it
                mask[row, :, columns, columns] = 0
        return args, {**kwargs, "attention_mask": mask}

    first = 0 if layer is None else layer + 1
    behind = model.model.language_model.layers[first:]
    return [one.register_forward_pre_hook(hide, with_kwargs=True) for one in behind]
