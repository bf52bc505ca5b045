"""How calls reach the visual pipeline: the `generate` mixin and the hooks around `forward`."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vistoken.adapters.vlm import PIPELINE, Pipeline, ShortPrompt
from vistoken.edits import Mixed
from vistoken.errors import AttachError
from vistoken.prompt import positions_from_mask

_REMEMBERED = "_vistoken_prompt"


@dataclass(frozen=True)
class LongPrompt:
    """The caller's prompt while `generate` runs on a shortened one.

    surplus: how far transformers overestimates the cache, because it adds the lengths of
    `input_ids` and `inputs_embeds` where they differ. mask [B, L]: the caller's attention mask.
    """

    surplus: int
    mask: Tensor


_GENERATING: ContextVar[LongPrompt | None] = ContextVar("vistoken_generating", default=None)


@dataclass(frozen=True)
class CachedPrompt:
    """How the prompt in a KV cache was shortened.

    long: its length before. mask [B, S]: the short attention mask. removed [B]: tokens removed
    from each row, on the CPU. original: whether positions were kept rather than renumbered. It
    travels from the hook before forward to the one after it on the short embeddings, and then
    with the cache.
    """

    long: int
    mask: Tensor
    removed: Tensor
    original: bool

    @classmethod
    def of(cls, pipeline: Pipeline, short: ShortPrompt) -> CachedPrompt:
        """Describe a short prompt."""
        plan = short.shortening
        original = pipeline.positions == "original"
        return cls(plan.layout.length, short.attention_mask, plan.removed, original)

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
        mask = self.mask.repeat_interleave(rows // own, dim=0)
        removed = self.removed.repeat_interleave(rows // own, dim=0)
        return CachedPrompt(self.long, mask, removed, self.original)


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
        token = _GENERATING.set(long)
        try:
            result = super().generate(ids, generation_config, *args, **changed)  # type: ignore[misc]
        finally:
            _GENERATING.reset(token)
        remembered = getattr(changed.get("inputs_embeds"), _REMEMBERED, None)
        for cache in (kwargs.get("past_key_values"), getattr(result, "past_key_values", None)):
            if remembered is not None and cache is not None:
                setattr(cache, _REMEMBERED, remembered)
        return result

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Size a static cache for the short prompt."""
        long = _GENERATING.get()
        if long is not None and "max_cache_length" in kwargs:
            kwargs["max_cache_length"] -= long.surplus
        elif long is not None and args and isinstance(args[-1], int):
            args = (*args[:-1], args[-1] - long.surplus)
        return super()._prepare_cache_for_generation(*args, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """Show logits processors the mask that fits the caller's `input_ids`.

        A repetition penalty looks up in it where the padding of the ids ends.
        """
        long = _GENERATING.get()
        given = kwargs.get("model_kwargs")
        if long is not None and given is not None:
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
) -> tuple[dict[str, Any], LongPrompt | None]:
    """The arguments for the bare `generate`, and the caller's prompt if it was shortened."""
    pixels = kwargs.get("pixel_values")
    encoded = kwargs.get("mm_encoder_outputs") or {}
    embeds = kwargs.get("inputs_embeds")
    prompt = ids if ids is not None else embeds
    if pixels is None and not encoded.get("image"):
        _refuse_continuing(kwargs.get("past_key_values"), any_filled=False)
        if prompt is not None:
            pipeline.note(0, prompt.shape[0], prompt.shape[1])
        return kwargs, None
    if pipeline.is_neutral():
        if pixels is not None and prompt is not None:
            images = pipeline.host.image_count(pixels)
            pipeline.note(images, prompt.shape[0], prompt.shape[1])
        return kwargs, None
    _refuse_modes(model, config, kwargs)
    pipeline.host.check_vision_arguments(kwargs)

    kwargs = dict(kwargs)
    mask = kwargs.pop("attention_mask", None)
    if mask is None and ids is not None:
        mask = _mask_from_padding(model, config, kwargs, ids)
    positions = kwargs.pop("position_ids", None)
    if positions is None and mask is not None and pipeline.positions == "original":
        positions = positions_from_mask(mask)  # as generate numbers a padded prompt
    short = pipeline.shorten(
        input_ids=ids,
        inputs_embeds=kwargs.pop("inputs_embeds", None),
        attention_mask=mask,
        position_ids=positions,
        pixel_values=kwargs.pop("pixel_values"),
    )
    for name in pipeline.host.vision_arguments:
        kwargs.pop(name, None)
    kwargs.update(
        inputs_embeds=short.inputs_embeds,
        attention_mask=short.attention_mask,
        position_ids=short.position_ids,
    )
    setattr(short.inputs_embeds, _REMEMBERED, CachedPrompt.of(pipeline, short))
    if ids is None:
        return kwargs, None
    mask = torch.ones_like(ids) if mask is None else mask
    short_length, long_length = short.shortening.length, ids.shape[1]
    if short_length == long_length:
        return kwargs, LongPrompt(0, mask)
    # transformers takes the embeddings' length off explicit limits on the whole sequence
    for name in ("max_length", "min_length"):
        limit = _setting(model, config, kwargs, name)
        if limit is not None:
            kwargs[name] = limit + short_length
    return kwargs, LongPrompt(long_length, mask)


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


def _refuse_modes(model: Any, config: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("pixel_values") is None:
        raise AttachError(
            "generate was given mm_encoder_outputs while visual tokens are pruned; pass "
            "pixel_values instead, so that the vision tower's signals can be read."
        )
    _refuse_continuing(kwargs.get("past_key_values"))
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
    if any_filled or hasattr(cache, _REMEMBERED):
        raise AttachError(
            "generate was given a KV cache that already holds tokens while visual tokens are "
            "pruned; pass the whole conversation with its images and an empty cache instead."
        )


class ShortenForward:
    """Hook before the model's forward: replaces the long prompt by the short one."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        pipeline: Pipeline = module.__dict__[PIPELINE]
        given = dict(zip(pipeline.host.forward_names, args, strict=False)) | kwargs
        remembered = getattr(given.get("past_key_values"), _REMEMBERED, None)
        if given.get("pixel_values") is None:
            if remembered is not None:
                return (), _continue(remembered, given)
            if (given.get("mm_encoder_outputs") or {}).get("image") is None:
                return None
        if pipeline.is_neutral():
            ids = given.get("input_ids")
            prompt = ids if ids is not None else given.get("inputs_embeds")
            if given.get("pixel_values") is not None and prompt is not None:
                images = pipeline.host.image_count(given["pixel_values"])
                pipeline.note(images, prompt.shape[0], prompt.shape[1])
            return None
        return (), _short_forward(pipeline, given)


def _short_forward(pipeline: Pipeline, given: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a forward call with the prompt shortened, labels included."""
    if given.get("pixel_values") is None:
        raise AttachError(
            "forward was given mm_encoder_outputs while visual tokens are pruned; pass "
            "pixel_values instead, so that the vision tower's signals can be read."
        )
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
    mask = given.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise AttachError(
            f"The attention mask must be 2-D [batch, length] to be shortened, got {mask.dim()}-D."
        )
    pipeline.host.check_vision_arguments(given)
    short = pipeline.shorten(
        input_ids=given.pop("input_ids", None),
        inputs_embeds=given.pop("inputs_embeds", None),
        attention_mask=mask,
        position_ids=given.get("position_ids"),
        pixel_values=given.pop("pixel_values"),
    )
    for name in pipeline.host.vision_arguments:
        given.pop(name, None)
    given.update(
        inputs_embeds=short.inputs_embeds,
        attention_mask=short.attention_mask,
        position_ids=short.position_ids,
    )
    if given.get("labels") is not None:
        given["labels"] = short.shortening.take(given["labels"], -100)
    setattr(short.inputs_embeds, _REMEMBERED, CachedPrompt.of(pipeline, short))
    return given


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
    if positions is not None and not remembered.original:
        given["position_ids"] = positions - remembered.removed[:, None].to(positions.device)
    elif positions is None and remembered.original:
        seen = given["past_key_values"].get_seq_length()
        first = remembered.long + seen - remembered.mask.shape[1]
        steps = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        given["position_ids"] = steps.expand(tokens.shape[:2])
    return given


class RememberOnCache:
    """Hook after the model's forward: notes on the returned KV cache how its prompt was cut."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        remembered = getattr(kwargs.get("inputs_embeds"), _REMEMBERED, None)
        cache = getattr(output, "past_key_values", None)
        if remembered is not None and cache is not None:
            setattr(cache, _REMEMBERED, remembered)
