"""What a model is, before anything is attached: its facts, what it would save, what fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vistoken import registry
from vistoken.attachment import attachments, core_model
from vistoken.contract import ModelFacts
from vistoken.dominance import Dominance
from vistoken.host import Host
from vistoken.report import Report

_TEXT_TOKENS = 64


@dataclass(frozen=True)
class Inspection:
    """Facts about a supported model.

    `methods` are the names that can be attached; `attached` those that are; `tokens` counts the
    visual tokens of a picture of the usual size; `savings` maps a number of kept tokens to the
    estimated report of a prefill of one such picture and 64 text tokens.
    """

    host: str
    title: str
    facts: ModelFacts
    places: tuple[str, ...]
    signals: tuple[str, ...]
    methods: tuple[str, ...]
    attached: tuple[str, ...]
    tokens: int
    savings: dict[int, dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        facts = self.facts
        rows, columns = facts.grid
        lines = [
            f"{self.title}: {self.tokens} visual tokens a picture "
            f"({'tiles of ' if facts.tiled else ''}{rows} x {columns}), "
            f"vision tower of {facts.vision_layers} layers (features after layer "
            f"{facts.feature_layer}), LLM of {facts.text_layers} layers",
            f"methods   {', '.join(self.methods)}",
            f"attached  {', '.join(self.attached) or 'nothing'}",
            f"prefill of one picture and {_TEXT_TOKENS} text tokens:",
        ]
        for keep, row in self.savings.items():
            saved = 1 - row["flops"] / row["flops_dense"]
            cache = 1 - row["kv_bytes"] / row["kv_bytes_dense"]
            lines.append(f"  {keep:>4} tokens   FLOPs -{saved:.1%}   KV cache -{cache:.1%}")
        return "\n".join(lines)


def inspect(model: Any) -> Inspection:
    """Return what vistoken sees in `model`; raises `ModelNotSupported` for an unknown one."""
    core = core_model(model)
    host = registry.recognise(core)
    facts = host.facts
    tokens = host.example().total
    budgets = [max(1, tokens // share) for share in (3, 9, 18)]
    return Inspection(
        host=host.name,
        title=host.title,
        facts=facts,
        places=tuple(sorted(place.value for place in host.places)),
        signals=tuple(sorted(signal.value for signal in host.signals)),
        methods=tuple(row.name for row in registry.list_methods() if host.name in row.hosts),
        attached=_attached(core),
        tokens=tokens,
        savings={keep: _estimate(host, keep) for keep in budgets},
    )


def inspect_dominance(model: Any, inputs: Mapping[str, Any], *, new_tokens: int = 16) -> Dominance:
    """Measure how much more a VLM attends to its text than to its pictures, in every LLM layer.

    Generates up to `new_tokens` tokens greedily from `inputs`, the processor's output on the
    model's device, and reads what they attend to; no attention map is materialised, and the model
    is left as it was. With a method attached that acts before the LLM the numbers are those of the
    pruned prompt. Raises `AttachError` when one acts inside the LLM, `DataError` where no row has
    both a picture and an answer, `MethodError` for a bad `new_tokens`, `ModelNotSupported`.
    Wu et al., arXiv 2508.10552.
    """
    core = core_model(model)
    host = registry.recognise(core)
    return Dominance.of(host.attention_masses(inputs, new_tokens), host.title, _attached(core))


def _attached(core: Any) -> tuple[str, ...]:
    return tuple(str(method) for held in attachments(core) for method in held.methods)


def _estimate(host: Host, keep: int) -> dict[str, Any]:
    report = Report(host.estimate(keep, _TEXT_TOKENS), host.facts).to_dict()
    return {key: report[key] for key in ("flops", "flops_dense", "kv_bytes", "kv_bytes_dense")}
