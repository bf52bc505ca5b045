"""Text dominance: how much more a VLM attends to its text than to what else it is given.

Metrics of Wu et al., "When Language Overrules", arXiv 2508.10552: MDI compares attention per
token, AEI a modality's share of the attention with its share of the tokens. Both are 1 where
attention is uniform. They are per token: MDI falls when visual tokens are pruned, whatever the
model does with those that are left, so report accuracy beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vistoken.errors import DataError, MethodError

Number = Tensor | float | int


def attention_mass(attention: Tensor, keys: Tensor, queries: Tensor | None = None) -> Tensor:
    """Return the attention mass [B] fp32 that the chosen queries give to the chosen keys.

    attention [B, H, Q, K] probabilities over all keys; keys [B, K] bool, say the text or the other
    tokens of each row; queries [B, Q] bool, the generated tokens (None: all). The mass is the sum
    over keys, averaged over heads and queries: padding, when False in both masks, takes no part.
    A row without queries is 0.
    """
    batch, heads, rows, columns = attention.shape
    if queries is None:
        queries = torch.ones(batch, rows, dtype=torch.bool, device=attention.device)
    if keys.shape != (batch, columns) or queries.shape != (batch, rows):
        raise MethodError(
            f"attention_mass: keys {list(keys.shape)} and queries {list(queries.shape)} must be "
            f"[B, K] and [B, Q] of attention {list(attention.shape)}."
        )
    # masked, not multiplied: what stands at padding may be NaN
    chosen = keys[:, None, None] & queries[:, None, :, None]
    mass = torch.where(chosen, attention.float(), 0.0).sum((1, 2, 3))
    return mass / (heads * queries.sum(-1)).clamp(min=1)


def mdi(text_mass: Number, other_mass: Number, text_count: Number, other_count: Number) -> Tensor:
    """Return the modality dominance index, (A_T / |T|) / (A_O / |O|), elementwise, fp64.

    text_mass, other_mass: attention to text and to other tokens, non-negative, in any common
    unit; text_count, other_count: numbers of those tokens, positive; tensors of shapes that
    broadcast, or numbers. Above 1 the text dominates. Infinite where only text is attended to,
    NaN where nothing is. Raises `MethodError` for negative masses and counts that are not
    positive, which reads tensors back from their device.
    """
    a, b, n, m = _checked("mdi", text_mass, other_mass, text_count, other_count)
    return (a / n) / (b / m)


def aei(mass: Number, other_mass: Number, count: Number, other_count: Number) -> Tensor:
    """Return the attention efficiency index, [A / (A + A_O)] / [n / (n + n_O)], elementwise, fp64.

    Of one modality (mass A, count n tokens) against the rest; limits, shapes and errors as in
    `mdi`. NaN where nothing is attended to.
    """
    a, b, n, m = _checked("aei", mass, other_mass, count, other_count)
    return (a / (a + b)) / (n / (n + m))


def depth_thirds(layers: int) -> dict[str, Sequence[int]]:
    """Return the layers of the `early`, `middle` and `late` third of `layers`, at least 3.

    Average masses over a third before taking an index. A remainder goes to the late third first,
    then to the middle one.
    """
    if layers < 3:
        raise MethodError(f"depth_thirds: needs at least 3 layers, got {layers}.")
    first, second = layers // 3, (2 * layers) // 3
    return {
        "early": range(first),
        "middle": range(first, second),
        "late": range(second, layers),
    }


@dataclass(frozen=True)
class Masses:
    """What the generated tokens of each row of a batch attended to, on the CPU.

    text, visual [L, R]: attention mass to the text and to the visual tokens of the prompt, in each
    LLM layer, averaged over heads and generated tokens; generated tokens are neither, though the
    softmax runs over them too. text_tokens, visual_tokens [R]: how many there are in the LLM;
    visual_tokens_dense [R]: before pruning; generated [R]: tokens that the means are over.
    """

    text: Tensor
    visual: Tensor
    text_tokens: Tensor
    visual_tokens: Tensor
    visual_tokens_dense: Tensor
    generated: Tensor


@dataclass(frozen=True)
class Third:
    """The indices of a third of the LLM's layers, `first` to `last`."""

    first: int
    last: int
    mdi: float
    aei: float


@dataclass(frozen=True)
class Dominance:
    """Text dominance of a model on some prompts, means over the rows.

    mdi, aei (of the text): one for each of the LLM's `layers`; thirds: early, middle and late, of
    their mean masses (none for fewer than 3 layers). rows: those of the batch that count, which
    have a picture and an answer; for each of them, text_tokens and visual_tokens in the LLM,
    visual_tokens_dense before pruning, and the tokens `generated`, the end token not counted.
    `attached`: methods on the model.
    """

    title: str
    attached: tuple[str, ...]
    layers: int
    mdi: tuple[float, ...]
    aei: tuple[float, ...]
    thirds: dict[str, Third]
    rows: tuple[int, ...]
    text_tokens: tuple[int, ...]
    visual_tokens: tuple[int, ...]
    visual_tokens_dense: tuple[int, ...]
    generated: tuple[int, ...]

    note: ClassVar[str] = (
        "1: even attention; above: text dominates. Per token, so MDI falls with fewer visual "
        "tokens: read it beside accuracy."
    )

    @classmethod
    def of(cls, masses: Masses, title: str, attached: tuple[str, ...]) -> Dominance:
        """Take the indices of masses; raises `DataError` where no row has any."""
        counts = (masses.text_tokens > 0) & (masses.visual_tokens > 0) & (masses.generated > 0)
        rows = counts.nonzero()[:, 0]
        if not len(rows):
            raise DataError(
                "No row of the batch has text, a picture and an answer to compare them by: the "
                "model ended every answer at once, or the prompts are empty; try other prompts."
            )
        text, visual = masses.text[:, rows], masses.visual[:, rows]
        sizes = masses.text_tokens[rows], masses.visual_tokens[rows]

        def means(index: Any, layers: Sequence[int]) -> float:
            """Of the mean masses of these layers, averaged over rows."""
            chosen = list(layers)
            return float(index(text[chosen].mean(0), visual[chosen].mean(0), *sizes).mean())

        layers = len(text)
        thirds = depth_thirds(layers) if layers >= 3 else {}
        return cls(
            title,
            attached,
            layers,
            tuple(means(mdi, [layer]) for layer in range(layers)),
            tuple(means(aei, [layer]) for layer in range(layers)),
            {
                name: Third(of[0], of[-1], means(mdi, of), means(aei, of))
                for name, of in thirds.items()
            },
            tuple(rows.tolist()),
            *(
                tuple(part[rows].tolist())
                for part in (
                    masses.text_tokens,
                    masses.visual_tokens,
                    masses.visual_tokens_dense,
                    masses.generated,
                )
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON: an index that is not finite is None."""
        content = asdict(self)
        for name in ("mdi", "aei"):
            content[name] = [_finite(value) for value in content[name]]
            for third in content["thirds"].values():
                third[name] = _finite(third[name])
        return content

    def table(self) -> list[tuple[str, str, str]]:
        """Rows of text: layers, MDI, AEI; the thirds come first."""
        found = [
            (f"{name} ({third.first} to {third.last})", third.mdi, third.aei)
            for name, third in self.thirds.items()
        ]
        found += [(str(n), *both) for n, both in enumerate(zip(self.mdi, self.aei, strict=True))]
        return [(where, f"{first:.3g}", f"{second:.3g}") for where, first, second in found]

    def summary(self) -> str:
        """What was measured, in one line: the model, what is attached, tokens."""
        tokens = [
            f"{name} {', '.join(map(str, dict.fromkeys(values)))}"
            for name, values in (
                ("text", self.text_tokens),
                ("visual", self.visual_tokens),
                ("visual before pruning", self.visual_tokens_dense),
                ("generated", self.generated),
            )
        ]
        return (
            f"{self.title}, {', '.join(self.attached) or 'nothing attached'}; "
            f"tokens a row: {'; '.join(tokens)}"
        )

    def __str__(self) -> str:
        rows = [("LLM layers", "MDI", "AEI"), *self.table()]
        width = max(len(where) for where, _, _ in rows)
        lines = [f"{where:<{width}}  {first:>8}  {second:>8}" for where, first, second in rows]
        return "\n".join([self.summary(), *lines, self.note])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _checked(name: str, *values: Number) -> tuple[Tensor, ...]:
    masses_counts = [torch.as_tensor(value).double() for value in values]
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    if any(bool((mass < 0).any()) for mass in masses_counts[:2]):
        raise MethodError(f"{name}: attention masses must not be negative, got {values[:2]}.")
    if any(not bool((count > 0).all()) for count in masses_counts[2:]):
        raise MethodError(
            f"{name}: token counts must be positive, got {values[2:]}; leave out rows without "
            "text or without other tokens."
        )
    return tuple(value.to(device) for value in masses_counts)
