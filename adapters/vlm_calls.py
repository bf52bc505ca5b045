"""`generate` of a pruned model: it prefills the short prompt and returns the caller's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistoken.adapters.vlm import PIPELINE
from vistoken.adapters.vlm_forward import (
    DENSE,
    GENERATING,
    REMEMBERED,
    CachedPrompt,
    LongIds,
    refuse_encoded,
)
from vistoken.adapters.vlm_pipeline import Pipeline
from vistoken.edits import Mixed
from vistoken.errors import AttachError
from vistoken.prompt import positions_from_mask


class PrunedGeneration(Mixed):
    """Mixin over a transformers VLM: `generate` prefills a shortened prompt."""

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Generate as the bare class does; the LLM reads the pruned prompt.

        Arguments and returned sequences are those of the bare `generate`. Raises `AttachError`
        for modes that cannot work on a shortened prompt: assisted decoding, chunked prefill,
        `use_cache=False`, going on from a filled cache, pre-computed `mm_encoder_outputs`.
        """
        pipeline: Pipeline = self.__dict__[PIPELINE]
        ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        with torch.no_grad():
            changed, long = _generate_arguments(self, pipeline, ids, generation_config, kwargs)
        token, dense = GENERATING.set(long), DENSE.set(None if long else pipeline)
        try:
            result = super().generate(ids, generation_config, *args, **changed)  # type: ignore[misc]
        finally:
            GENERATING.reset(token)
            DENSE.reset(dense)
        remembered = getattr(changed.get("inputs_embeds"), REMEMBERED, None)
        for cache in (kwargs.get("past_key_values"), getattr(result, "past_key_values", None)):
            if remembered is not None and cache is not None:
                setattr(cache, REMEMBERED, remembered)
        return result

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Size a static cache for the short prompt."""
        long = GENERATING.get()
        if long is not None and "max_cache_length" in kwargs:
            kwargs["max_cache_length"] -= long.surplus
        elif long is not None and args and isinstance(args[-1], int):
            args = (*args[:-1], args[-1] - long.surplus)
        return super()._prepare_cache_for_generation(*args, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Show logits processors the mask that fits the caller's `input_ids`.

        A repetition penalty looks up in it where the padding of the ids ends.
        """
        long = GENERATING.get()
        given = kwargs.get("model_kwargs")
        if long is not None and long.mask is not None and given is not None:
            rows = given["inputs_embeds"].shape[0]
            mask = long.mask.repeat_interleave(rows // long.mask.shape[0], dim=0)
            kwargs["model_kwargs"] = {**given, "attention_mask": mask}
        return super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]


def _setting(model: Any, config: Any, kwargs: dict[str, Any], name: str) -> Any:
    """The value of a generation setting: keyword, then given config, then the model's own."""
    for value in (
        kwargs.get(name),
        getattr(config, name, None),
        getattr(model.generation_config, name, None),
    ):
        if value is not None:
            return value
    return None


def _generate_arguments(
    model: Any, pipeline: Pipeline, ids: Tensor | None, config: Any, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], LongIds | None]:
    """The arguments for the bare `generate`, and the caller's prompt if it was shortened."""
    embeds = kwargs.get("inputs_embeds")
    prompt = ids if ids is not None else embeds
    if not pipeline.has_pictures(kwargs) and not kwargs.get("mm_encoder_outputs"):
        _refuse_continuing(kwargs.get("past_key_values"), any_filled=False)
        if prompt is not None:
            pipeline.note_dense((), prompt.shape[0], prompt.shape[1])
        return kwargs, None
    if pipeline.never_acts and not pipeline.has_pictures(kwargs):
        return kwargs, None
    vision = pipeline.vision_of(kwargs)
    mask = kwargs.get("attention_mask")
    if mask is None and ids is not None:
        mask = _mask_from_padding(model, config, kwargs, ids)
    positions = kwargs.get("position_ids")
    if positions is None and mask is not None and pipeline.host.facts.position_axes == 1:
        positions = positions_from_mask(mask)  # as generate numbers a padded prompt
        positions = positions if pipeline.keeps_positions else None
    refuse_encoded(pipeline, kwargs)
    long = pipeline.read(ids, embeds, mask, positions, vision)
    if pipeline.is_neutral(long.pictures):
        pipeline.note_dense(long.pictures, long.layout.rows, long.layout.length)
        return kwargs, None
    _refuse_modes(model, pipeline, config, kwargs)
    pipeline.host.check_vision_arguments(kwargs)
    short = pipeline.shorten(long)

    replaced = ("inputs_embeds", "attention_mask", "position_ids", *pipeline.host.text_arguments)
    kwargs = {k: v for k, v in kwargs.items() if k not in vision and k not in replaced}
    kwargs.update(
        inputs_embeds=short.inputs_embeds,
        attention_mask=short.attention_mask,
        position_ids=short.position_ids,
    )
    setattr(short.inputs_embeds, REMEMBERED, CachedPrompt.of(pipeline, short))
    short_length, long_length = short.shortening.length, long.layout.length
    rows = long.layout.rows
    if ids is None:
        return kwargs, LongIds(pipeline, 0, None, short.language, rows)
    mask = torch.ones_like(ids) if mask is None else mask
    if short_length == long_length:
        return kwargs, LongIds(pipeline, 0, mask, short.language, rows)
    # transformers takes the embeddings' length off explicit limits on the whole sequence
    for name in ("max_length", "min_length"):
        limit = _setting(model, config, kwargs, name)
        if limit is not None:
            kwargs[name] = limit + short_length
    return kwargs, LongIds(pipeline, long_length, mask, short.language, rows)


def _mask_from_padding(
    model: Any, config: Any, kwargs: dict[str, Any], ids: Tensor
) -> Tensor | None:
    """The mask that transformers would infer from padding ids, or None."""
    pad = _setting(model, config, kwargs, "pad_token_id")
    eos = _setting(model, config, kwargs, "eos_token_id")
    stops = eos if isinstance(eos, (list, tuple)) else [eos]
    if pad is None or pad in stops:
        return None
    return (ids != pad).long()


def _refuse_modes(model: Any, pipeline: Pipeline, config: Any, kwargs: dict[str, Any]) -> None:
    cache = kwargs.get("past_key_values")
    _refuse_continuing(cache)
    implementation = _setting(model, config, kwargs, "cache_implementation")
    if pipeline.cuts_inside and implementation not in (None, "dynamic", "dynamic_full"):
        raise AttachError(
            f"cache_implementation={implementation!r} gives every layer one length, but pruning "
            "inside the LLM leaves layers of unequal length; use the dynamic cache, or prune "
            "before the LLM."
        )
    refused = {
        "assistant_model": "assisted decoding",
        "prompt_lookup_num_tokens": "prompt lookup decoding",
        "prefill_chunk_size": "chunked prefill",
    }
    for name, mode in refused.items():
        if _setting(model, config, kwargs, name) is not None:
            raise AttachError(
                f"{mode} ({name}) does not work on a shortened prompt; leave it out, or detach "
                "for this call."
            )
    if _setting(model, config, kwargs, "use_cache") is False:
        raise AttachError(
            "use_cache=False does not work on a shortened prompt; leave the cache on, or detach "
            "for this call."
        )


def _refuse_continuing(cache: Any, *, any_filled: bool = True) -> None:
    """Refuse a filled cache: any, or only one that holds a shortened prompt."""
    if cache is None or cache.get_seq_length() == 0:
        return
    if any_filled or hasattr(cache, REMEMBERED):
        raise AttachError(
            "generate was given a KV cache that already holds tokens while visual tokens are "
            "pruned; pass the whole conversation with its images and an empty cache instead."
        )
