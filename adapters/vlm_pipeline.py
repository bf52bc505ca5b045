"""The visual pipeline of one prefill: from a call's arguments to the short prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vistoken import prompt
from vistoken.adapters.vlm import VisionLanguageHost
from vistoken.adapters.vlm_language import Group, LanguagePlan
from vistoken.adapters.vlm_prompt import LongPrompt, ShortPrompt
from vistoken.adapters.vlm_tower import Entry, TowerCall, current_call, stack
from vistoken.contract import Place, Signal, Stage, View
from vistoken.errors import DataError, MethodError
from vistoken.kernels import gather_tokens
from vistoken.language import Text
from vistoken.pictures import Picture
from vistoken.pruning import Pruner
from vistoken.report import CallRecord


@dataclass(frozen=True)
class Pipeline:
    """The pruning methods on one model, in the order they act."""

    host: VisionLanguageHost
    entries: tuple[Entry, ...]

    @property
    def keeps_positions(self) -> bool:
        """Whether the short prompt leaves tokens at the positions they had."""
        if self.host.facts.position_axes > 1:
            return True
        before = [e for e in self.entries if any(s.place is not Place.LLM_LAYER for s in e.stages)]
        return any(entry.method.keeps_positions(self.host.facts) for entry in before)

    @property
    def cuts_inside(self) -> bool:
        """Whether some stage lies inside the LLM."""
        return any(True for entry in self.entries for _ in entry.at(Place.LLM_LAYER))

    @property
    def follows_llm(self) -> bool:
        """Whether hooks inside the LLM need to know of each forward call."""
        return self.cuts_inside or self.host.injects

    @property
    def drops_newlines(self) -> bool:
        """Whether newline tokens of tiled pictures are dropped."""
        return any(entry.method.newlines == "drop" for entry in self.entries)

    @property
    def never_acts(self) -> bool:
        """Whether every budget keeps every token of any picture."""
        return all(e.method.ratio == 0 and not e.method.always for e in self.entries)

    def is_neutral(self, pictures: Sequence[Picture]) -> bool:
        """Whether every token of these pictures stays, so that the model must run untouched."""
        return all(
            self._budget(entry.method, picture) is None
            for entry in self.entries
            for picture in set(pictures)
        )

    def vision_of(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call that only the tower reads, without those that are None."""
        names = (*self.host.pixel_arguments, *self.host.vision_arguments)
        return {name: given[name] for name in names if given.get(name) is not None}

    def has_pictures(self, given: dict[str, Any]) -> bool:
        """Whether a call brings pixels."""
        return any(given.get(name) is not None for name in self.host.pixel_arguments)

    @torch.compiler.disable  # planning on the CPU is not for the compiler; the tower is
    def read(
        self,
        ids: Tensor | None,
        embeds: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        vision: dict[str, Any],
    ) -> LongPrompt:
        """Find the pictures in a call's prompt; raises `DataError` where they do not fit."""
        kinds = self._kinds(ids, embeds)
        pictures = tuple(self.host.pictures(vision, kinds))
        numbers = {kind: n for n, kind in enumerate(self.host.placeholders(), 1)}
        wanted = [(numbers[picture.kind], picture.total) for picture in pictures]
        layout = prompt.read_layout(kinds, wanted, None if mask is None else mask.cpu())
        return LongPrompt(ids, embeds, mask, positions, vision, kinds, pictures, layout)

    def _kinds(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        if ids is None and embeds is None:
            raise DataError("The call has pixel_values but neither input_ids nor inputs_embeds.")
        placeholders = self.host.placeholders().values()
        if ids is not None:
            known = ids.cpu()
            found = [known == token for token in placeholders]
        else:
            assert embeds is not None  # one of the two is given
            tokens = torch.tensor(list(placeholders), device=embeds.device)
            rows = self.host.model.get_input_embeddings()(tokens)
            found = [(embeds == row).all(-1).cpu() for row in rows]
        numbers = torch.arange(1, len(found) + 1)
        return (torch.stack(found, dim=-1) * numbers).sum(-1)

    def _budget(self, method: Pruner, picture: Picture) -> int | None:
        """How many of a picture's own tokens stay, or None when everything does."""
        total = method.budget(picture.total)
        if total >= picture.total:
            return picture.tokens if method.always else None
        stay = 0 if self.drops_newlines else len(picture.separators)
        if total <= stay:
            raise MethodError(
                f"{method.name}: a budget of {total} tokens leaves none for a picture whose {stay} "
                f"newline tokens must stay; keep at least {stay + 1}, or set newlines='drop'."
            )
        return min(total - stay, picture.tokens)

    def note_dense(self, pictures: Sequence[Picture], rows: int, length: int) -> None:
        """Note a call that runs dense: neutral, or without pictures."""
        layers = self.host.facts.text_layers
        entering = tuple(picture.total for picture in pictures)
        flops = self.host.tower_flops(pictures, {}, None)
        record = CallRecord(
            tuple(pictures),
            rows,
            length,
            (length,) * layers,
            (sum(entering),) * layers,
            entering,
            None,
            flops,
            flops,
            self._itemsize,
        )
        for entry in self.entries:
            entry.ledger.write(record)

    def shorten(self, long: LongPrompt) -> ShortPrompt:
        """Encode and prune the pictures, and build the short prompt around their features."""
        host = self.host
        if host.facts.position_axes > 1:
            long = self._with_positions(long)
        call, groups, features = self._encode(long)
        device = features[0].device  # the caller may have left the prompt on the CPU
        kept, visual, counts = self._assemble(long, groups, features)
        plan = _plan(long.layout, kept, counts)
        if long.embeds is None:
            filler = next(iter(host.placeholders().values()))
            ids = plan.take(_on(device, long.ids), filler)
            embeds = _on(device, host.model.get_input_embeddings()(ids))
        else:
            embeds = gather_tokens(_on(device, long.embeds), plan.index)
        at = (plan.visual_rows, plan.visual_columns)
        embeds = embeds.index_put(at, visual.to(embeds.dtype))
        mask = _on(device, long.mask)
        if mask is None:
            shape = (long.layout.rows, long.layout.length)
            mask = torch.ones(shape, dtype=torch.long, device=device)
        positions = self._positions(long, plan, mask)
        short = plan.take(mask, 0)
        if self.cuts_inside:
            for group in groups:
                group.follow(None)  # from here on its slots count in the short run
        record = self._record(long, call, groups, plan)
        for entry in self.entries:
            entry.ledger.write(record)
        injected = host.inject(call, plan, list(kept.split(counts))) if host.injects else {}
        language = LanguagePlan(self.entries, groups, plan.short, short, record, injected)
        return ShortPrompt(embeds, short, positions, plan, language)

    # --- vision ---------------------------------------------------------------------------------

    def _encode(self, long: LongPrompt) -> tuple[TowerCall, list[Group], list[Tensor]]:
        """Run the tower and the stages up to the projector: features [G, K, C] of each group."""
        host = self.host
        budgets = self._tower_budgets(long.pictures)
        call = TowerCall(host, self.entries, long.pictures, long.vision, budgets)
        if any(budget is not None for budget in budgets):
            call.visible = host.visible(call)
        with current_call(call):
            encoded = host.encode(call)
        groups = self._groups(call, encoded)
        features = []
        for group in groups:
            found = stack(encoded, group.members)
            for number, entry in enumerate(self.entries):
                for stage in entry.at(Place.PROJECTED):
                    found = self._select(long, call, group, number, stage, found)
            features.append(found)
        return call, groups, features

    def _tower_budgets(self, pictures: Sequence[Picture]) -> tuple[int | None, ...]:
        """For each entry the tokens of a tile that pass the tower; None where it does not act."""
        found: list[int | None] = []
        tiles = self.host.tiles(pictures)
        for entry in self.entries:
            inside = any(s.place in (Place.VISION_BLOCK, Place.VISION_LAYER) for s in entry.stages)
            keeps = [self._budget(entry.method, picture) for picture in pictures]
            if not inside or any(keep is None for keep in keeps):
                found.append(None)
                continue
            wanted = [keep or 0 for keep in keeps]
            needed = max(_level(keep, of) for keep, of in zip(wanted, tiles, strict=True))
            most, keep = max((len(of), keep) for of, keep in zip(tiles, wanted, strict=True))
            found.append(entry.method.tower_budget(keep, most, needed))
        return tuple(found)

    def _groups(self, call: TowerCall, encoded: Sequence[Tensor] | Tensor) -> list[Group]:
        members: dict[Picture, list[int]] = {}
        for number, picture in enumerate(call.pictures):
            members.setdefault(picture, []).append(number)
        packed = call.origin if call.packed_origin is None else call.packed_origin
        groups = []
        for picture, numbers in members.items():
            own = tuple(numbers)
            device = encoded[own[0]].device
            if packed is None:
                origin = torch.arange(picture.tokens, device=device).expand(len(own), -1)
            else:
                origin = stack(packed, own).to(device)
            budgets = tuple(self._budget(entry.method, picture) for entry in self.entries)
            shared = not self.host.facts.tiled and len(members) == 1
            memories = call.memories if shared else {}
            run = torch.arange(origin.shape[1], device=device).expand_as(origin)
            none = torch.zeros(len(own), 0, dtype=torch.long, device=device)
            groups.append(Group(picture, own, origin, run, none, budgets, memories))
        return groups

    def _select(
        self,
        long: LongPrompt,
        call: TowerCall,
        group: Group,
        number: int,
        stage: Stage,
        features: Tensor,
    ) -> Tensor:
        """The features of a group after one stage behind the projector."""
        host, method, keep = self.host, self.entries[number].method, group.budgets[number]
        if keep is None:
            return features
        if group.origin.shape[1] <= method.survivors(group.picture.tokens, keep, host.facts):
            return features

        def read(signal: Signal) -> Any:
            if signal in (Signal.FEATURES, Signal.HIDDEN):
                return features
            if signal is Signal.PROJECTOR:
                return host.projector()
            if signal is Signal.IMAGE_KEY:
                return stack(host.image_keys(long.vision), group.members)
            if signal is Signal.TEXT_EMBEDDINGS:
                return self._text(long, group.members, features.device)
            layer = host.facts.feature_layer if stage.layer is None else stage.layer
            return stack(host.tower_signal(call, signal, layer), group.members)

        memory = group.memories.setdefault(number, {})
        chosen = method.select(
            View(stage, host.facts, group.picture, group.origin, memory, read), keep
        )
        if chosen is None:
            return features
        group.origin = group.origin.gather(1, chosen.indices)
        if chosen.tokens is not None:
            return chosen.tokens
        return gather_tokens(features, chosen.indices)

    def _text(self, long: LongPrompt, members: tuple[int, ...], device: torch.device) -> Text:
        from vistoken.adapters.vlm_rows import Columns

        columns = Columns(long.layout, members, device)
        rows = columns.rows[:, None]
        if long.embeds is not None:
            return Text(_on(device, long.embeds)[rows, columns.text], columns.text_mask)
        ids = _on(device, long.ids)[rows, columns.text]
        embeds = self.host.model.get_input_embeddings()(ids)
        return Text(_on(device, embeds), columns.text_mask)

    # --- the short prompt -----------------------------------------------------------------------

    def _assemble(
        self, long: LongPrompt, groups: list[Group], features: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Which tokens of their runs stay [T], their features [T, C], and how many of each picture.

        Picture by picture, newline tokens included.
        """
        runs, tokens = [], []
        for group, found in zip(groups, features, strict=True):
            picture, run = group.picture, group.origin
            if picture.separators:
                run = _on(found.device, picture.run_index())[run]
            group.slots = run
            acts = any(budget is not None for budget in group.budgets)
            if picture.separators and not (acts and self.drops_newlines):
                between = _on(found.device, torch.tensor(picture.separators))
                group.separators = between.expand(len(run), -1)
                newline = self.host.separator().to(found).expand(*group.separators.shape, -1)
                run, order = torch.cat([run, group.separators], dim=1).sort(dim=1)
                found = gather_tokens(torch.cat([found, newline], dim=1), order)
            runs.append(run)
            tokens.append(found)
        if len(groups) == 1:
            return runs[0].flatten(), tokens[0].flatten(0, 1), [runs[0].shape[1]] * len(runs[0])
        where = {
            member: (number, row)
            for number, group in enumerate(groups)
            for row, member in enumerate(group.members)
        }
        places = [where[member] for member in range(len(long.pictures))]
        kept = [runs[number][row] for number, row in places]
        visual = torch.cat([tokens[number][row] for number, row in places])
        return torch.cat(kept), visual, [len(stay) for stay in kept]

    def _with_positions(self, long: LongPrompt) -> LongPrompt:
        """The prompt with positions [3 or 4, B, L], found before the tower fills the device."""
        given = long.positions
        if given is None:
            mask = torch.ones_like(long.kinds) if long.mask is None else long.mask.cpu()
            given = self.host.long_positions(long.ids, long.kinds, mask, long.vision)
        elif given.dim() == 2:
            given = given.expand(3, *long.kinds.shape)
        return replace(long, positions=given.to(self.host.model.device))

    def _positions(self, long: LongPrompt, plan: prompt.Shortening, mask: Tensor) -> Tensor | None:
        """Positions of the short prompt; None lets the model number its columns, as it would."""
        given = _on(mask.device, long.positions)
        if self.host.facts.position_axes > 1:
            axes = plan.take(given[-3:], 0)
            text = prompt.positions_from_mask(plan.take(mask, 0))
            return torch.cat([text[None], axes])
        if given is None and not self.keeps_positions:
            return None
        if given is None:
            given = torch.arange(plan.layout.length, device=mask.device)
        given = given.expand(plan.layout.rows, -1)
        return plan.take(given, 0) if self.keeps_positions else plan.renumber(given)

    # --- the report -----------------------------------------------------------------------------

    @property
    def _itemsize(self) -> int:
        return self.host.model.get_input_embeddings().weight.dtype.itemsize

    def _record(
        self, long: LongPrompt, call: TowerCall, groups: list[Group], plan: prompt.Shortening
    ) -> CallRecord:
        host, layers = self.host, self.host.facts.text_layers
        wanted = {s for entry in self.entries for stage in entry.stages for s in stage.signals}
        return CallRecord(
            long.pictures,
            long.layout.rows,
            long.layout.length,
            (plan.length,) * layers,
            (sum(plan.short.tokens),) * layers,
            plan.short.tokens,
            tuple(group.kept() for group in groups),
            host.tower_flops(long.pictures, call.lengths, call.projected),
            host.tower_flops(long.pictures, {}, None),
            self._itemsize,
            tuple(note for signal, note in host.fallbacks.items() if signal in wanted),
        )


_plan = torch.compiler.disable(prompt.shorten)


def _level(keep: int, tiles: list[int]) -> int:
    """The least t for which tiles of these sizes, cut to t tokens each, hold `keep` tokens."""
    low, high = 1, max(tiles)
    while low < high:
        middle = (low + high) // 2
        if sum(min(middle, size) for size in tiles) >= keep:
            high = middle
        else:
            low = middle + 1
    return low


def _on(device: torch.device, tensor: Any) -> Any:
    """The tensor, or None, on `device`, without waiting for it."""
    return None if tensor is None else tensor.to(device, non_blocking=True)
