"""Greedy answers of a vision-language model to many questions about each picture.

    exam = prepare(processor, pictures, prompts)      # prompts[i]: all prompts about pictures[i]
    texts = answer(model, processor, exam)            # texts[i][j]: the answer to prompts[i][j]

What stands before the question, the picture above all, is read once for all prompts about it: one
prefill of the common prefix, then every question goes on from its KV cache. Causal attention makes
that the same computation as one `generate` for each question; the calls are the model's own, so
whatever is attached acts. Where that does not hold, `answer` uses `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vistoken
from vistoken.errors import DataError
from vistoken.pruning import Pruner

Ids = tuple[int, ...]
Progress = Callable[[int], object]

# Model types whose forward takes pixel_values for the prefix and one position per token.
SHARED_PREFIX_TYPES = ("llava",)
# Settings under which a greedy token is not the argmax of the logits.
_PLAIN_SETTINGS = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length"),
    *("min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
    *("begin_suppress_tokens", "sequence_bias", "encoder_repetition_penalty", "guidance_scale"),
    *("exponential_decay_length_penalty", "watermarking_config", "stop_strings", "max_time"),
)


@dataclass(frozen=True)
class Exam:
    """Pictures and the prompts about them, ready for a model.

    pixel_values [P, 3, H, W]; prompts[i][j]: token ids of prompt j about picture i, image
    placeholders expanded.
    """

    pixel_values: Tensor
    prompts: tuple[tuple[Ids, ...], ...]

    @property
    def questions(self) -> int:
        """Number of prompts about all pictures."""
        return sum(len(prompts) for prompts in self.prompts)


@dataclass(frozen=True)
class Answer:
    """New token ids without the one that ended them, and the first token's logits [V] in fp32."""

    ids: Ids
    first_logits: Tensor


def prepare(processor: Any, pictures: Sequence[Any], prompts: Sequence[Sequence[str]]) -> Exam:
    """Tokenize prompts and preprocess pictures with a transformers processor.

    Every prompt holds the image placeholder exactly once. Raises `DataError` if one does not, and
    for a picture without a prompt.
    """
    if len(pictures) != len(prompts) or not pictures:
        raise DataError(f"{len(pictures)} pictures have {len(prompts)} lists of prompts.")
    placeholder = processor.image_token
    for texts in prompts:
        if isinstance(texts, str) or not texts:
            raise DataError(f"Every picture needs a list of prompts, got {texts!r}.")
        for text in texts:
            if text.count(placeholder) != 1:
                raise DataError(
                    f"A prompt must hold {placeholder} exactly once, got {text!r:.120}."
                )
    pixels, ids = [], []
    for picture, texts in zip(pictures, prompts, strict=True):
        first = processor(images=picture, text=texts[0], return_tensors="pt")
        pixels.append(first["pixel_values"])
        ids.append(_expand(processor, tuple(first["input_ids"][0].tolist()), texts))
    return Exam(torch.cat(pixels), tuple(ids))


def _expand(processor: Any, first: Ids, texts: Sequence[str]) -> tuple[Ids, ...]:
    """Token ids of all prompts about one picture; the processor has expanded the first one."""
    image = processor.image_token_id
    count = first.count(image)
    expanded = []
    for text in texts:
        plain = processor.tokenizer(text)["input_ids"]
        place = plain.index(image)
        expanded.append((*plain[:place], *[image] * count, *plain[place + 1 :]))
    if expanded[0] != first:
        raise DataError("The processor expands the image placeholder in an unknown way.")
    return tuple(expanded)


def answer(
    model: Any,
    processor: Any,
    exam: Exam,
    *,
    max_new_tokens: int = 32,
    batch: int = 4,
    progress: Progress | None = None,
) -> list[list[str]]:
    """Return the greedy answers as text, without special tokens; `progress(n)` follows n prompts.

    `batch` is the number of pictures that are read at once.
    """
    answers = answer_ids(model, exam, max_new_tokens=max_new_tokens, batch=batch, progress=progress)
    return [
        [processor.decode(found.ids, skip_special_tokens=True).strip() for found in row]
        for row in answers
    ]


def answer_ids(
    model: Any,
    exam: Exam,
    *,
    max_new_tokens: int = 32,
    batch: int = 4,
    progress: Progress | None = None,
) -> list[list[Answer]]:
    """Return the greedy answers as token ids, by the shared prefix where that is exact."""
    if max_new_tokens < 1 or batch < 1:
        raise DataError(
            f"max_new_tokens and batch must be at least 1, got {max_new_tokens} and {batch}."
        )
    shares = shares_prefix(model)
    answers: list[list[Answer]] = []
    for start in range(0, len(exam.prompts), batch):
        prompts = exam.prompts[start : start + batch]
        pixels = exam.pixel_values[start : start + batch].to(model.device)
        cut = common_prefix(prompts)
        whole = shares and model.config.image_token_id not in {
            token for row in prompts for ids in row for token in ids[cut:]
        }
        how = _by_prefix if whole else _by_generate
        answers += how(model, pixels, prompts, max_new_tokens)
        if progress is not None:
            progress(sum(len(row) for row in prompts))
    return answers


def shares_prefix(model: Any) -> bool:
    """Whether decoding from a shared prefix gives what greedy `generate` gives on this model.

    It does for known model types, without logits processors, and while only pruning methods are
    attached that choose by the picture alone: others see the question, which a prefix lacks.
    """
    from transformers import GenerationConfig

    plain, settings = GenerationConfig(), model.generation_config
    changed = [
        name
        for name in _PLAIN_SETTINGS
        if getattr(settings, name, None) not in (None, getattr(plain, name, None), 0, 1.0)
    ]
    methods = [method for held in vistoken.attachments(model) for method in held.methods]
    return (
        getattr(model.config, "model_type", None) in SHARED_PREFIX_TYPES
        and not changed
        and all(isinstance(m, Pruner) and not m.follows_text for m in methods)
    )


def common_prefix(prompts: Sequence[Sequence[Ids]]) -> int:
    """Return how many leading ids all prompts share, short of the last id of the shortest."""
    rows = [ids for row in prompts for ids in row]
    limit = min(len(ids) for ids in rows) - 1
    first = rows[0]
    for place in range(limit):
        if any(ids[place] != first[place] for ids in rows):
            return place
    return limit


@torch.no_grad()
def _by_prefix(
    model: Any, pixels: Tensor, prompts: Sequence[Sequence[Ids]], limit: int
) -> list[list[Answer]]:
    """Read the pictures and the common prefix once, then one question about each in turn."""
    cut = common_prefix(prompts)
    prefix = torch.tensor(prompts[0][0][:cut], device=pixels.device).expand(len(prompts), cut)
    out = model(
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        pixel_values=pixels,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = out.past_key_values
    filled = cache.get_seq_length()
    answers: list[list[Answer]] = [[] for _ in prompts]
    for turn in range(max(len(row) for row in prompts)):
        # A picture with fewer questions than others gets its first one again, to be thrown away.
        texts = [row[turn if turn < len(row) else 0][cut:] for row in prompts]
        found = _go_on(model, cache, cut, texts, limit)
        for row, asked, given in zip(answers, prompts, found, strict=True):
            if turn < len(asked):
                row.append(given)
        added = cache.get_seq_length() - filled
        cache.crop(-added)
    return answers


def _go_on(model: Any, cache: Any, cut: int, texts: Sequence[Ids], limit: int) -> list[Answer]:
    """Decode one continuation per row of a cache that holds `cut` tokens of the long prompt."""
    ids, mask = pad_left(texts, _pad_id(model), model.device)
    positions = cut + (mask.cumsum(1) - 1).clamp(min=0)
    mask = torch.cat([mask.new_ones(len(texts), cut), mask], dim=1)
    stops = torch.tensor(stop_ids(model), device=ids.device, dtype=torch.long)
    steps: list[Tensor] = []
    first_logits: Tensor | None = None
    done = torch.zeros(len(texts), dtype=torch.bool, device=ids.device)
    while len(steps) < limit:
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if first_logits is None:
            first_logits = logits.float()
        ids = logits.argmax(-1, keepdim=True)
        steps.append(ids[:, 0])
        done |= torch.isin(ids[:, 0], stops)
        if bool(done.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(texts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    assert first_logits is not None  # the limit is at least one
    return _cut_at_stop(torch.stack(steps, dim=1), first_logits, stop_ids(model))


@torch.no_grad()
def _by_generate(
    model: Any, pixels: Tensor, prompts: Sequence[Sequence[Ids]], limit: int
) -> list[list[Answer]]:
    """Answer all prompts about the pictures with one call of the model's own `generate`."""
    ids, mask = pad_left([ids for row in prompts for ids in row], _pad_id(model), model.device)
    times = torch.tensor([len(row) for row in prompts], device=pixels.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels.repeat_interleave(times, dim=0),
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    new = out.sequences[:, ids.shape[1] :]
    found = iter(_cut_at_stop(new, out.logits[0].float(), stop_ids(model)))
    return [[next(found) for _ in row] for row in prompts]


def generate_answers(
    model: Any,
    processor: Any,
    pictures: Sequence[Any],
    prompts: Sequence[Sequence[str]],
    *,
    max_new_tokens: int = 32,
    batch: int = 4,
    progress: Progress | None = None,
) -> list[list[str]]:
    """Answer with processor and `generate` alone, `batch` prompts at once: works for any model."""
    pairs = [
        (picture, text) for picture, texts in zip(pictures, prompts, strict=True) for text in texts
    ]
    texts: list[str] = []
    for some in _chunks(pairs, batch):
        inputs = processor(
            images=[picture for picture, _ in some],
            text=[text for _, text in some],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        if progress is not None:
            progress(len(some))
    ordered = iter(texts)
    return [[next(ordered) for _ in row] for row in prompts]


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def pad_left(rows: Sequence[Ids], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Return ids and mask [B, L] int64 of rows that end in the same column."""
    length = max(len(row) for row in rows)
    ids = [[pad] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def stop_ids(model: Any) -> list[int]:
    """Return the token ids that end an answer."""
    stop = model.generation_config.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


def _pad_id(model: Any) -> int:
    pad = model.generation_config.pad_token_id
    return next(iter(stop_ids(model)), 0) if pad is None else pad


def _cut_at_stop(new: Tensor, first_logits: Tensor, stops: Sequence[int]) -> list[Answer]:
    answers = []
    for row, logits in zip(new.tolist(), first_logits.cpu(), strict=True):
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        answers.append(Answer(tuple(row[:end]), logits))
    return answers
