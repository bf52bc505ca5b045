"""Forward calls of a pruned model: the long prompt becomes the short one, and the cache knows.

A call with pictures is shortened; a decode step that was written against the long prompt is mapped
to the short one in its KV cache; the prefill inside `generate` is told what the LLM must do.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm import PIPELINE
from vistoken.adapters.vlm_cut import Cut
from vistoken.adapters.vlm_language import LanguageCall, LanguagePlan, begin, current
from vistoken.adapters.vlm_pipeline import Pipeline
from vistoken.adapters.vlm_prompt import ShortPrompt
from vistoken.errors import AttachError

REMEMBERED = "_vistoken_prompt"
_CUTS = "_vistoken_cuts"


@dataclass(frozen=True)
class LongIds:
    """The caller's prompt while `generate` runs on a shortened one.

    surplus: how far transformers overestimates the cache, because it adds the lengths of
    `input_ids` and `inputs_embeds` where they differ. mask [B, L]: the caller's attention mask,
    None when there are no ids. language: what the LLM needs to know of the prefill. rows of the
    prompt.
    """

    pipeline: Pipeline
    surplus: int
    mask: Tensor | None
    language: LanguagePlan
    rows: int


GENERATING: ContextVar[LongIds | None] = ContextVar("vistoken_generating", default=None)
DENSE: ContextVar[Pipeline | None] = ContextVar("vistoken_generating_dense", default=None)


@dataclass(frozen=True)
class CachedPrompt:
    """How the prompt in a KV cache was shortened.

    long: its length before. mask [B, S]: the short attention mask. removed [B]: tokens removed
    from each row, on the CPU. original: whether positions were kept rather than renumbered. next
    [B]: the position of the first token behind each row, where positions have three axes. It
    travels from the hook before forward to the one after it on the short embeddings, and then
    with the cache.
    """

    long: int
    mask: Tensor
    removed: Tensor
    original: bool
    next: Tensor | None = None

    @classmethod
    def of(cls, pipeline: Pipeline, short: ShortPrompt) -> CachedPrompt:
        """Describe a short prompt."""
        plan, behind = short.shortening, None
        if pipeline.host.facts.position_axes > 1 and short.position_ids is not None:
            behind = short.position_ids[1:].amax(dim=(0, 2)) + 1
        original = pipeline.keeps_positions
        return cls(plan.layout.length, short.attention_mask, plan.removed, original, behind)

    def repeated(self, rows: int) -> CachedPrompt:
        """The same for a cache whose rows were repeated (beams, several questions a picture)."""
        own = self.mask.shape[0]
        if rows == own:
            return self
        if rows % own:
            raise AttachError(
                f"The KV cache was filled by {own} pruned prompt(s), which {rows} rows cannot "
                "continue; repeat its rows evenly."
            )
        mask, removed, behind = (
            None if part is None else part.repeat_interleave(rows // own, dim=0)
            for part in (self.mask, self.removed, self.next)
        )
        assert mask is not None
        assert removed is not None
        return CachedPrompt(self.long, mask, removed, self.original, behind)


def refuse_encoded(pipeline: Pipeline, given: dict[str, Any]) -> None:
    """Raise `AttachError` for a call that brings encoded pictures instead of pixels."""
    if not pipeline.has_pictures(given):
        raise AttachError(
            "The call has mm_encoder_outputs while visual tokens are pruned; pass pixel_values "
            "instead, so that the vision tower's signals can be read."
        )


class ShortenForward:
    """Hook before the model's forward: replaces the long prompt by the short one."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        pipeline: Pipeline = module.__dict__[PIPELINE]
        given = dict(zip(pipeline.host.forward_names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        _begin(pipeline, None, cache)
        if DENSE.get() is pipeline:
            return None
        if not pipeline.has_pictures(given):
            if given.get("mm_encoder_outputs") and not pipeline.never_acts:
                refuse_encoded(pipeline, given)
            generating = GENERATING.get()
            filled = cache is not None and cache.get_seq_length() > 0
            if generating is not None and generating.pipeline is pipeline and not filled:
                copies = given["inputs_embeds"].shape[0] // generating.rows
                _begin(pipeline, generating.language, cache, copies)
                return None
            if not filled:
                _note_text(pipeline, given)
            remembered = getattr(cache, REMEMBERED, None)
            return None if remembered is None else ((), _continue(remembered, given))
        changed = _short_forward(pipeline, given)
        return None if changed is None else ((), changed)


def _note_text(pipeline: Pipeline, given: dict[str, Any]) -> None:
    """Note a prompt without pictures, so that the report is of the last call."""
    ids = given.get("input_ids")
    prompt = ids if ids is not None else given.get("inputs_embeds")
    if prompt is not None:
        pipeline.note_dense((), prompt.shape[0], prompt.shape[1])


def _begin(pipeline: Pipeline, language: LanguagePlan | None, cache: Any, copies: int = 1) -> None:
    """Say what the hooks inside the LLM have to do in this forward call."""
    if not pipeline.follows_llm:
        return
    if language is not None:
        if pipeline.cuts_inside and getattr(cache, "is_compileable", False):
            raise AttachError(
                f"A {type(cache).__name__} gives every layer one length, but pruning inside the "
                "LLM leaves layers of unequal length; use a DynamicCache, or prune before the LLM."
            )
        begin(pipeline.host, LanguageCall(pipeline.host, language, [], copies))
    else:
        cuts: list[Cut] = getattr(cache, _CUTS, [])
        begin(pipeline.host, LanguageCall(pipeline.host, None, cuts) if cuts else None)


def _short_forward(pipeline: Pipeline, given: dict[str, Any]) -> dict[str, Any] | None:
    """The keyword arguments of a forward call with the prompt shortened, labels included.

    None when every token stays.
    """
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        if pipeline.never_acts:
            return None
        raise AttachError(
            f"The attention mask must be 2-D [batch, length] to be shortened, got {mask.dim()}-D."
        )
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    vision = pipeline.vision_of(given)
    long = pipeline.read(ids, embeds, mask, given.get("position_ids"), vision)
    if pipeline.is_neutral(long.pictures):
        pipeline.note_dense(long.pictures, long.layout.rows, long.layout.length)
        return None
    _refuse_forward(pipeline, given)
    pipeline.host.check_vision_arguments(given)
    short = pipeline.shorten(long)
    replaced = ("input_ids", *pipeline.host.text_arguments, *vision)
    given = {k: v for k, v in given.items() if k not in replaced}
    given.update(
        inputs_embeds=short.inputs_embeds,
        attention_mask=short.attention_mask,
        position_ids=short.position_ids,
    )
    if given.get("labels") is not None:
        given["labels"] = short.shortening.take(given["labels"], -100)
    setattr(short.inputs_embeds, REMEMBERED, CachedPrompt.of(pipeline, short))
    _begin(pipeline, short.language, given.get("past_key_values"))
    return given


def _refuse_forward(pipeline: Pipeline, given: dict[str, Any]) -> None:
    cache = given.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise AttachError(
            "forward was given images and a KV cache that already holds tokens while visual tokens "
            "are pruned; pass the whole conversation with an empty cache instead."
        )
    if isinstance(given.get("logits_to_keep"), Tensor):
        raise AttachError(
            "logits_to_keep as a tensor would address the shortened sequence; pass a number of "
            "last positions, or detach for this call."
        )
    if given.get("labels") is not None and pipeline.cuts_inside:
        raise AttachError(
            "labels cannot be matched to a sequence that is shortened inside the LLM; leave them "
            "out, or prune before the LLM for training."
        )


def _continue(remembered: CachedPrompt, given: dict[str, Any]) -> dict[str, Any]:
    """A decode step written against the long prompt, mapped to the short one in the cache."""
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given["inputs_embeds"]
    remembered = remembered.repeated(tokens.shape[0])
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() == 2 and mask.shape[1] > remembered.long:
        given["attention_mask"] = torch.cat(
            [remembered.mask.to(mask.dtype), mask[:, remembered.long :]], dim=1
        )
    positions = given.get("position_ids")
    since = given["past_key_values"].get_seq_length() - remembered.mask.shape[1]
    steps = torch.arange(since, since + tokens.shape[1], device=tokens.device)
    if remembered.next is not None:
        if positions is None:
            axes = (remembered.next[:, None].to(tokens.device) + steps).expand(3, -1, -1)
            text = (remembered.mask.sum(1, keepdim=True) + steps)[None]
            given["position_ids"] = torch.cat([text.to(axes), axes])
    elif positions is not None and not remembered.original:
        given["position_ids"] = positions - remembered.removed[:, None].to(positions.device)
    elif positions is None and remembered.original:
        given["position_ids"] = (remembered.long + steps).expand(tokens.shape[:2])
    return given


class FinishForward:
    """Hook after the model's forward: notes on the KV cache how its prompt was cut."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        pipeline: Pipeline = module.__dict__[PIPELINE]
        cache = getattr(output, "past_key_values", None)
        remembered = getattr(kwargs.get("inputs_embeds"), REMEMBERED, None)
        if remembered is not None and cache is not None:
            setattr(cache, REMEMBERED, remembered)
        call = current(pipeline.host)
        if call is None:
            return
        begin(pipeline.host, None)
        if call.plan is not None:
            call.finish()
            if cache is not None and call.cuts:
                setattr(cache, _CUTS, [cut.for_decoding() for cut in call.cuts])
