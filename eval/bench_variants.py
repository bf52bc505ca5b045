"""What `bench_prune` measures: the methods with their options, and the settings of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import vistoken
from vistoken.errors import DataError
from vistoken.eval.bench_models import find_size


@dataclass(frozen=True)
class Variant:
    """A method with its options.

    merged: whether some of its tokens are averages rather than picks. wide: measured at every
    budget, not only at `Settings.wide_keeps`. newlines: of tiled pictures.
    """

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    merged: bool = False
    wide: bool = False
    newlines: str = "keep"

    @property
    def label(self) -> str:
        """The name in tables, such as `holov (paper)`."""
        values = ", ".join(str(value) for _, value in self.options)
        return f"{self.method} ({values})" if values else self.method

    def attach(self, model: Any, keep: int) -> vistoken.Attachment:
        """Attach the method to `model` with `keep` tokens per picture."""
        options = {**dict(self.options), "newlines": self.newlines}
        return vistoken.prune_visual_tokens(model, keep=keep, method=self.method, **options)


# the first is the one that goals are about
VARIANTS = (
    Variant("spread", wide=True),
    Variant("holov", (("mode", "paper"),), wide=True),
    Variant("holov", (("mode", "released"),)),
    Variant("holov", (("mode", "paper-2d"),)),
    Variant("cls_topk", wide=True),
    Variant("divprune"),
    Variant("zeroth_order"),
    Variant("visionzip", merged=True),
    Variant("vmtc", merged=True),
    Variant("flowcut"),
    Variant("tome", merged=True),
    Variant("vflowopt", merged=True),
    Variant("fastv"),
    Variant("pyramid"),
    Variant("adaptinfer"),
    Variant("sparsevlm", (("mode", "v1.5"),), merged=True),
    Variant("sparsevlm", (("mode", "v2"),)),
    Variant("random", wide=True),
    Variant("uniform"),
    Variant("pooling", merged=True),
)
# without newline tokens, so that exactly the budget enters the LLM
TILED_VARIANTS = tuple(
    Variant(name, merged=name == "visionzip", newlines="drop")
    for name in ("spread", "cls_topk", "visionzip", "random")
)


@dataclass(frozen=True)
class Settings:
    """What to measure.

    keeps: budgets of the dense comparison, which `wide` variants go through; the others are
    measured at those of `wide_keeps` only. `rotation` input sets take turns; `before` and `after`
    are text tokens.
    """

    model: str = "llava-1.5-7b"
    dtype: str = "bfloat16"
    batches: tuple[int, ...] = (1, 8)
    keeps: tuple[int, ...] = (192, 128, 64)
    wide_keeps: tuple[int, ...] = (64,)
    variants: tuple[Variant, ...] = VARIANTS
    before: int = 35
    after: int = 25
    repeats: int = 10
    warmup: int = 2
    rotation: int = 2
    decode_steps: int = 16
    new_tokens: int = 16
    generate_repeats: int = 2

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of a picture in the dense model."""
        return find_size(self.model).visual_tokens

    @property
    def file_name(self) -> str:
        """The name of the result file: one for each family of models."""
        return "bench_prune_next" if find_size(self.model).tiled else "bench_prune"

    def variants_at(self, keep: int) -> tuple[Variant, ...]:
        """The variants that are measured at a budget."""
        every = keep in self.wide_keeps
        return tuple(variant for variant in self.variants if every or variant.wide)

    def at(self, keeps: tuple[int, ...]) -> Settings:
        """The same at other budgets: all variants at the smallest of them."""
        return replace(self, keeps=keeps, wide_keeps=(min(keeps),))

    def choose(self, methods: str | None) -> Settings:
        """The same with those methods only, given as names with commas between; None: all."""
        if methods is None:
            return self
        names = methods.split(",")
        known = {variant.method for variant in self.variants}
        if unknown := sorted(set(names) - known):
            raise DataError(
                f"no benchmark for {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        chosen = tuple(variant for variant in self.variants if variant.method in names)
        return replace(self, variants=chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for the result file."""
        plain = {key: value for key, value in asdict(self).items() if key != "variants"}
        return plain | {
            "title": find_size(self.model).title,
            "visual_tokens": self.visual_tokens,
            "methods": [variant.label for variant in self.variants],
        }


NEXT = Settings(
    model="llava-next-7b",
    batches=(8,),
    keeps=(160,),
    wide_keeps=(160,),
    variants=TILED_VARIANTS,
    repeats=6,
    decode_steps=8,
    generate_repeats=1,
)
SMOKE = Settings(
    model="tiny",
    dtype="float32",
    batches=(1, 2),
    keeps=(12, 4),
    wide_keeps=(4,),
    before=6,
    after=4,
    repeats=3,
    warmup=1,
    decode_steps=4,
    new_tokens=4,
)
SMOKE_NEXT = replace(
    SMOKE,
    model="tiny-next",
    batches=(2,),
    keeps=(40, 12),
    wide_keeps=(40, 12),
    variants=TILED_VARIANTS,
)
PRESETS = {settings.model: settings for settings in (Settings(), NEXT, SMOKE, SMOKE_NEXT)}


def preset(model: str, *, smoke: bool = False) -> Settings:
    """The settings for a model, or those of its small counterpart; `DataError` if unknown."""
    size = find_size(model)
    return PRESETS[size.small if smoke else model]
