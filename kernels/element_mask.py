"""Which pairs of tokens are seen inside a block: questions to a mask, and answers as bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vistoken.errors import MethodError

# mask(b, h, q, kv) -> bool: int64 tensors that broadcast against each other in, one bool a pair out
ElementMask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# pairs of tokens that an element mask is asked about at once
CHUNK = {"cpu": 1 << 22, "cuda": 1 << 24}
WORD = 32


class _Watch(TorchFunctionMode):
    """Notes whether an operation reads one tensor."""

    def __init__(self, watched: Tensor) -> None:
        super().__init__()
        self.watched, self.read = watched, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        self.read = self.read or any(leaf is self.watched for leaf in leaves)
        return func(*args, **kwargs)


def reads(mask: ElementMask, argument: int, device: torch.device) -> bool:
    """Return whether a mask reads its batch (0) or head (1) index, from one question to it."""
    indices = [torch.zeros(1, 1, 1, dtype=torch.int64, device=device) for _ in range(4)]
    with _Watch(indices[argument]) as watch:
        answer = mask(*indices)
    return watch.read or answer is indices[argument]


@dataclass(frozen=True)
class Tokens:
    """How many tokens there are, in which blocks, and how many keys of each block are valid."""

    q_tokens: int
    kv_tokens: int
    block_q: int
    block_kv: int
    lengths: Tensor | None

    def of(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens q [n, block_q, 1] and kv [n, 1, block_kv] of pairs of blocks; which are valid."""
        q = query[:, None, None] * self.block_q + torch.arange(
            self.block_q, device=query.device
        ).reshape(1, -1, 1)
        column = torch.arange(self.block_kv, device=key.device).reshape(1, 1, -1)
        kv = key[:, None, None] * self.block_kv + column
        valid = (q < self.q_tokens) & (kv < self.kv_tokens)
        if self.lengths is not None:
            longest = self.lengths.reshape(-1, self.lengths.shape[-1]).amax(0)
            valid = valid & (column < longest[key][:, None, None])
        return q.clamp(max=self.q_tokens - 1), kv.clamp(max=self.kv_tokens - 1), valid


def examine(pairs: Tensor, mask: ElementMask, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """What each pair of blocks is: -1 full, -2 empty, or its entry of the table of bit masks."""
    kinds, tables, offset = [], [], 0
    for kind, table in _examine_chunks(pairs, mask, tokens):
        kinds.append(torch.where(kind >= 0, kind + offset, kind))
        tables.append(table)
        offset += len(table)
    if not offset:
        return torch.cat([pairs.new_empty(0), *kinds]), None
    table, which = unique_rows(torch.cat(tables))
    kind = torch.cat(kinds)
    return torch.where(kind >= 0, which[kind.clamp(min=0)], kind), table


def _examine_chunks(
    pairs: Tensor, mask: ElementMask, tokens: Tokens
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `examine`, with a table of its own for every chunk of pairs."""
    at_once = CHUNK.get(pairs.device.type, CHUNK["cpu"]) // (tokens.block_q * tokens.block_kv)
    for chunk in pairs.split(max(at_once, 1)):
        b, h = (chunk[:, i, None, None] for i in (0, 1))
        q, kv, valid = tokens.of(chunk[:, 2], chunk[:, 3])
        seen = mask(b, h, q, kv)
        if seen.dtype != torch.bool:
            raise MethodError(f"A mask must return bool, one answer a pair, got {seen.dtype}.")
        seen = seen & valid
        full = (seen == valid).flatten(1).all(1)
        empty = ~seen.flatten(1).any(1)
        part = ~(full | empty)
        table, which = unique_rows(pack_bits(seen[part]))
        kind = torch.where(empty, -2, -1)
        kind[part] = which
        yield kind, table


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different entries of `rows` [n, ...] and, of each of the n, which one it is."""
    if not len(rows):
        return rows, torch.empty(0, dtype=torch.int64, device=rows.device)
    table, which = rows.unique(dim=0, return_inverse=True)
    return table, which


def pack_bits(seen: Tensor) -> Tensor:
    """Return bool [..., keys] as int32 [..., ceil(keys / 32)]; key c is bit c % 32."""
    keys = seen.shape[-1]
    padded = torch.nn.functional.pad(seen, (0, -keys % WORD))
    bits = padded.reshape(*seen.shape[:-1], -(-keys // WORD), WORD).int()
    return (bits << torch.arange(WORD, dtype=torch.int32, device=seen.device)).sum(
        -1, dtype=torch.int32
    )


def unpack_bits(words: Tensor, keys: int) -> Tensor:
    """Return int32 [..., words] as bool [..., keys]."""
    bits = words[..., None] >> torch.arange(WORD, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(-2)[..., :keys].bool()
