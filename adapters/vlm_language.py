"""Pruning inside the LLM: what one forward call knows, and the hooks on its decoder layers.

A cut after layer l is one index: the columns of the prompt that layers behind it still have. It
gathers the hidden states once, and at every later layer the rotary embeddings and the mask that
the model built for its full length; in a decode step it picks the columns of that mask which the
layer's own, shorter KV cache holds. So every attention backend sees the mask it would have seen.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vistoken import prompt
from vistoken.adapters.vlm_cut import Cut
from vistoken.adapters.vlm_rows import Columns, HostRows, LayerInputs
from vistoken.adapters.vlm_tower import Entry
from vistoken.contract import Place, Selection, Signal, Stage, View
from vistoken.errors import AttachError
from vistoken.kernels import gather_tokens
from vistoken.pictures import Picture
from vistoken.report import CallRecord, Kept

if TYPE_CHECKING:
    from vistoken.adapters.vlm import VisionLanguageHost


@dataclass
class Group:
    """The pictures of one geometry in a call: they are chosen from together.

    members: their numbers. origin [G, N]: which of the picture's tokens are left. slots [G, N] and
    separators [G, S]: where those and the newline tokens lie in the picture's run of tokens, as it
    is in the prompt now. budgets: for each entry the tokens that stay, None for all. memories: each
    entry's own.
    """

    picture: Picture
    members: tuple[int, ...]
    origin: Tensor
    slots: Tensor
    separators: Tensor
    budgets: tuple[int | None, ...]
    memories: dict[int, dict[str, Any]]

    def kept(self) -> Kept:
        """What is left, for the report."""
        return Kept(self.members, self.origin, self.separators.shape[1] > 0)

    def follow(self, chosen: Selection | None) -> Tensor:
        """Follow a choice (None: all stay); returns which tokens of each run stay, [G, K + S]."""
        picked = self.slots
        if chosen is not None:
            self.origin = self.origin.gather(1, chosen.indices)
            picked = self.slots.gather(1, chosen.indices)
        count = picked.shape[1]
        stay, order = torch.cat([picked, self.separators], dim=1).sort(dim=1)
        rank = order.argsort(dim=1)
        self.slots, self.separators = rank[:, :count], rank[:, count:]
        return stay


@dataclass
class LanguagePlan:
    """What the LLM needs to know of one prefill: made with the short prompt, used once.

    layout: of the short prompt. mask [B, S]: its attention mask. record: the report so far.
    injected: arguments for the language model that only this prefill has.
    """

    entries: tuple[Entry, ...]
    groups: list[Group]
    layout: prompt.Layout
    mask: Tensor
    record: CallRecord
    injected: dict[str, Any] = field(default_factory=dict)


@dataclass
class LanguageCall:
    """One forward pass of the LLM: a prefill (`plan` is given) or a decode step (it is None).

    copies: how many neighbouring rows share a prompt (beams). cuts: those made so far, in order
    of layers. noted: what entered the self-attention of a stage's layer.
    """

    host: VisionLanguageHost
    plan: LanguagePlan | None
    cuts: list[Cut]
    copies: int = 1
    noted: dict[int, LayerInputs] = field(default_factory=dict)

    def enter(self, layer: int, hidden: Tensor, given: Any) -> tuple[Tensor, Any]:
        """Hidden states and arguments with which decoder layer `layer` is to run."""
        if self.plan is not None:
            for number, entry in enumerate(self.plan.entries):
                for stage in entry.at(Place.LLM_LAYER, layer - 1):
                    hidden = self._run_stage(self.plan, number, stage, hidden)
        for cut in reversed(self.cuts):
            if cut.layer < layer:
                prefill = self.plan is not None
                return hidden, cut.arguments(self.host, hidden, given, prefill=prefill)
        return hidden, given

    def note(self, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> None:
        """Note what enters a layer's self-attention, once for all copies of a row."""
        if self.plan is None:
            return
        cos, sin = (part[:: self.copies] for part in rotary)
        self.noted[layer] = LayerInputs(hidden[:: self.copies], cos, sin, self.plan.mask)

    def _run_stage(self, plan: LanguagePlan, number: int, stage: Stage, hidden: Tensor) -> Tensor:
        method = plan.entries[number].method
        choices: list[Selection | None] = []
        for group in plan.groups:
            view = self._view(plan, number, stage, group, hidden)
            budget = group.budgets[number]
            chosen = None if view is None or budget is None else method.select(view, budget)
            choices.append(chosen)
        if all(chosen is None for chosen in choices):
            return hidden
        return self._cut(plan, number, stage, choices, hidden)

    def _view(
        self, plan: LanguagePlan, number: int, stage: Stage, group: Group, hidden: Tensor
    ) -> View | None:
        """What the method sees of a group, or None when its budget there is met."""
        facts, method, budget = self.host.facts, plan.entries[number].method, group.budgets[number]
        if budget is None:
            return None
        left = method.survivors(group.picture.tokens, budget, facts)
        if group.origin.shape[1] <= left and not method.always:
            return None
        columns = Columns(plan.layout, group.members, hidden.device)
        visual = columns.firsts[:, None] + group.slots

        def read(signal: Signal) -> Any:
            if signal is Signal.HIDDEN:
                return hidden[:: self.copies][columns.rows[:, None], visual]
            layer = stage.layer
            assert signal is Signal.LLM_ATTENTION and layer is not None  # attach checks signals
            return HostRows(self.host, layer, self.noted[layer], columns, visual)

        memory = group.memories.setdefault(number, {})
        return View(stage, facts, group.picture, group.origin, memory, read)

    def _cut(
        self,
        plan: LanguagePlan,
        number: int,
        stage: Stage,
        choices: list[Selection | None],
        hidden: Tensor,
    ) -> Tensor:
        """Shorten the stream after the stage's layer, and note the cut for the layers behind."""
        assert stage.layer is not None
        old, groups = plan.layout, plan.groups
        kept = [hidden.new_empty(0)] * old.images
        for group, chosen in zip(groups, choices, strict=True):
            for member, stay in zip(group.members, group.follow(chosen), strict=True):
                kept[member] = stay
        change = prompt.shorten(old, torch.cat(kept), [len(stay) for stay in kept])
        base = gather_tokens(hidden[:: self.copies], change.index)
        renumbers = not plan.entries[number].method.keeps_positions(self.host.facts)
        cut = Cut.after(stage.layer, change, self.cuts[-1] if self.cuts else None, renumbers)
        for group, chosen in zip(groups, choices, strict=True):
            if chosen is None or (chosen.tokens is None and chosen.hidden is None):
                continue
            columns = Columns(change.short, group.members, hidden.device)
            visual = columns.firsts[:, None] + group.slots
            if chosen.tokens is not None:
                base = base.index_put((columns.rows[:, None], visual), chosen.tokens.to(base.dtype))
            if chosen.hidden is not None:
                pairs = chosen.hidden & columns.text_mask[..., None]
                cut.hide(columns.rows, columns.text, visual, pairs)
        self.cuts.append(cut)
        plan.layout, plan.mask = change.short, change.take(plan.mask, 0)
        return base.repeat_interleave(self.copies, dim=0)

    def finish(self) -> None:
        """Complete the report of a prefill: lengths by layer, and what was left at the end."""
        plan = self.plan
        if plan is None or not self.cuts:
            return
        lengths = {cut.layer: (cut.length, cut.visual) for cut in self.cuts}
        record = plan.record.after_cuts(lengths, tuple(group.kept() for group in plan.groups))
        for entry in plan.entries:
            entry.ledger.write(record)


_LANGUAGE: ContextVar[tuple[LanguageCall, ...]] = ContextVar("vistoken_language_calls", default=())


def begin(host: VisionLanguageHost, call: LanguageCall | None) -> None:
    """Make `call` the one that hooks on this host's decoder layers follow; None for none.

    A call of another model that is under way in this thread goes on behind it.
    """
    running = _LANGUAGE.get()
    for number, one in enumerate(running):
        if one.host is host:
            running = running[:number]
            break
    _LANGUAGE.set(running if call is None else (*running, call))


def current(host: VisionLanguageHost) -> LanguageCall | None:
    """The call of this host's model in this thread, if there is one."""
    return next((call for call in _LANGUAGE.get() if call.host is host), None)


@dataclass(frozen=True)
class NoteLayerInput:
    """Hook before a decoder layer's self-attention: notes the normed hidden states."""

    host: VisionLanguageHost
    layer: int

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call = current(self.host)
        if call is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            call.note(self.layer, hidden, kwargs["position_embeddings"])


@dataclass(frozen=True)
class CutBeforeLayer:
    """Hook before a decoder layer: lets it run on what the stages before it left."""

    host: VisionLanguageHost
    layer: int

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = current(self.host)
        if call is None:
            return None
        if torch.is_grad_enabled() and getattr(module, "gradient_checkpointing", False):
            raise AttachError(
                "Pruning inside the LLM does not work with gradient checkpointing, which runs the "
                "layers again outside the call; switch checkpointing off, or prune before the LLM."
            )
        hidden, given = call.enter(self.layer, args[0], kwargs)
        return (hidden, *args[1:]), given


@dataclass(frozen=True)
class InjectArguments:
    """Hook before the language model: adds the arguments that only this prefill has."""

    host: VisionLanguageHost

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = current(self.host)
        if call is None or call.plan is None or not call.plan.injected:
            return None
        return args, {**kwargs, **self.host.injected(call.plan.injected, call.copies)}
