"""What generated tokens of a VLM attend to: read beside the model's own attention, step by step.

A decode step has one query per row, so its attention is a row, never a map; the keys lie in the
KV cache already, turned and in the model's dtype. The model runs whatever attention it was loaded
with, and a pruned prompt is generated from as it would be without the probes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vistoken import prompt
from vistoken.adapters.vlm import PIPELINE
from vistoken.adapters.vlm_pipeline import Pipeline
from vistoken.adapters.vlm_prompt import LongPrompt
from vistoken.adapters.vlm_rows import rotate
from vistoken.contract import Signal
from vistoken.dominance import Masses, attention_mass
from vistoken.edits import Edits
from vistoken.errors import AttachError, DataError, MethodError
from vistoken.kernels import attention_row

if TYPE_CHECKING:
    from vistoken.adapters.vlm import VisionLanguageHost


@dataclass(frozen=True)
class Keys:
    """The prompt in the LLM, [B, S] bool on the CPU; padding is in neither."""

    text: Tensor
    visual: Tensor


@dataclass
class Reading:
    """One generation: which columns of the prompt are what, and the masses read so far.

    masses: for each LLM layer, for each decode step, the attention [2, B] to text and to pictures.
    """

    host: VisionLanguageHost
    pipeline: Pipeline
    long: LongPrompt
    cache: Any
    masses: list[list[Tensor]] = field(default_factory=list)

    @cached_property
    def prompt(self) -> Keys:
        """The prompt in the LLM; known once the prefill has begun."""
        long, mask = self.long, self.long.mask
        assert mask is not None  # `measure` gives one
        on, visual = mask.cpu() != 0, long.kinds != 0
        records = [entry.ledger.last for entry in self.pipeline.entries]
        if records and records[-1] is not None and records[-1].kept is not None:
            counts = records[-1].entering
            first = [torch.arange(count, device="cpu") for count in counts]
            plan = prompt.shorten(long.layout, torch.cat(first), counts)
            on = plan.take(on, 0)
            visual = torch.zeros_like(on)
            visual[plan.visual_rows, plan.visual_columns] = True
        return Keys(on & ~visual, on & visual)

    def note(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Read one layer's attention in a decode step from what entered it; a prefill is passed by.

        hidden [B, 1, C], normed; rotary: cos and sin [B or 1, 1, D].
        """
        keys = self.cache.layers[layer].keys
        behind = keys.shape[2] - self.prompt.text.shape[1]
        if behind <= 0:
            return
        cos, sin = rotary
        if cos.dim() != 3:
            raise AttachError(
                f"This release of transformers joins the position axes of {self.host.title} inside "
                "each attention layer, where its attention cannot be read; use 5.17 or newer."
            )
        query = self.host.language_heads(layer, hidden, Signal.VISION_QUERIES).float()
        query = rotate(query, cos.float(), sin.float())
        text, visual = (
            torch.nn.functional.pad(part, (0, behind)).to(keys.device)
            for part in (self.prompt.text, self.prompt.visual)
        )
        allowed = text | visual
        allowed[:, -behind:] = True
        scale = self.host.language_scale(layer)
        row = attention_row(query, keys, scale, allowed[:, None, None])
        self.masses[layer].append(
            torch.stack([attention_mass(row, text), attention_mass(row, visual)])
        )


@dataclass(frozen=True)
class NoteAttention:
    """Hook after a decoder layer's self-attention, when its keys are in the cache."""

    reading: Reading
    layer: int

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.reading.note(self.layer, hidden, kwargs["position_embeddings"])


def measure(host: VisionLanguageHost, inputs: Mapping[str, Any], new_tokens: int) -> Masses:
    """Generate greedily from `inputs`; return what the generated tokens attended to.

    Every token counts that was fed back: up to `new_tokens` of each row, without the end token.
    """
    from transformers import DynamicCache

    if not isinstance(new_tokens, int) or isinstance(new_tokens, bool) or new_tokens < 1:
        raise MethodError(f"new_tokens must be a whole number of at least 1, got {new_tokens!r}.")
    pipeline: Pipeline = host.model.__dict__.get(PIPELINE) or Pipeline(host, ())
    if pipeline.cuts_inside:
        names = ", ".join(str(entry.method) for entry in pipeline.entries)
        raise AttachError(
            f"Text dominance compares layers that see the same tokens, but {names} drops tokens "
            "inside the LLM; detach it, or use a method that acts before the LLM."
        )
    ids = inputs.get("input_ids")
    if ids is None or not pipeline.has_pictures(dict(inputs)):
        raise DataError(
            "Text dominance needs input_ids and a picture; pass what the processor returns for a "
            "prompt with an image."
        )
    mask = inputs.get("attention_mask")
    given = {**inputs, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    long = pipeline.read(ids, None, given["attention_mask"], None, pipeline.vision_of(given))
    reading = Reading(host, pipeline, long, DynamicCache())
    new = _generate(reading, given, new_tokens)[:, ids.shape[1] :].cpu()
    valid = _before_the_end(new, host.model.generation_config.eos_token_id)
    keys, generated = reading.prompt, valid.sum(1)
    steps = [torch.stack([part.cpu() for part in own], -1) for own in reading.masses if own]
    shape = (host.facts.text_layers, 2, len(ids), valid.shape[1])
    every = torch.stack(steps) if steps else torch.zeros(shape)  # [L, 2, B, steps]
    means = (every * valid).sum(-1) / generated.clamp(min=1)
    return Masses(
        means[:, 0],
        means[:, 1],
        keys.text.sum(1),
        keys.visual.sum(1),
        (long.kinds != 0).sum(1),
        generated,
    )


def _generate(reading: Reading, given: dict[str, Any], new_tokens: int) -> Tensor:
    """The sequences, one token longer than asked for, so that the last of those is fed back too."""
    host, edits = reading.host, Edits()
    reading.masses = [[] for _ in range(host.facts.text_layers)]
    try:
        for layer in range(host.facts.text_layers):
            edits.hook_after(host.language_attention(layer), NoteAttention(reading, layer))
        return host.model.generate(
            **given,
            past_key_values=reading.cache,
            max_new_tokens=new_tokens + 1,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=False,
        )
    finally:
        edits.undo()


def _before_the_end(new: Tensor, end: int | list[int] | None) -> Tensor:
    """Which tokens that were fed back [B, steps] precede the end token of their row."""
    ends = torch.tensor([] if end is None else end, dtype=torch.long, device="cpu").flatten()
    return ~torch.isin(new[:, :-1], ends).cummax(1).values
