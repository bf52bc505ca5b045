"""Block lists: against brute force from the pairs of tokens, seen from both sides."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from mask_cases import draw_mask
from vistoken.errors import MethodError
from vistoken.kernels.block_mask import BlockMask, infer_block
from vistoken.kernels.element_mask import pack_bits, reads, unpack_bits


def listed(count: Tensor, index: Tensor, *more: Tensor) -> dict[tuple[int, ...], list[int]]:
    """(b, h, query block, key block) of every entry of padded lists, and what else it holds."""
    used = torch.arange(index.shape[-1]) < count[..., None]
    rows = torch.cat([used.nonzero()[:, :3], index[used][:, None]], 1).tolist()
    held = torch.stack([x[used] for x in more], 1).tolist() if more else [[]] * len(rows)
    found = dict(zip(map(tuple, rows), held, strict=True))
    assert len(found) == len(rows)
    return found


def blocks_of(seen: Tensor, block_q: int, block_kv: int, fill: bool) -> Tensor:
    """Bool [..., S, N] as [..., nq, nk, block_q, block_kv]; `fill` beyond the tokens."""
    ends = (0, -seen.shape[-1] % block_kv, 0, -seen.shape[-2] % block_q)
    padded = torch.nn.functional.pad(seen, ends, value=fill)
    return padded.unflatten(-1, (-1, block_kv)).unflatten(-3, (-1, block_q)).transpose(-2, -3)


def check_lists(mask: BlockMask, seen: Tensor) -> None:
    """The lists are those of brute force: full only where every valid pair is visible."""
    assert torch.equal(mask.visible(), seen)
    size = mask.block_q, mask.block_kv
    full = blocks_of(seen, *size, True).flatten(-2).all(-1)
    some = blocks_of(seen, *size, False).flatten(-2).any(-1)
    in_full = listed(mask.full_count, mask.full_index)
    in_part = listed(mask.partial_count, mask.partial_index, mask.partial_bits)
    assert set(in_full) == set(map(tuple, full.nonzero().tolist()))
    assert set(in_part) == set(map(tuple, (some & ~full).nonzero().tolist()))


# --- from a map and a mask -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_lists_equal_brute_force(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    batch, heads, s, n = (int(torch.randint(1, x, (1,), generator=draw)) for x in (3, 4, 90, 90))
    block = tuple(16 << int(x) for x in torch.randint(0, 2, (2,), generator=draw))
    on = torch.rand(batch, heads, -(-s // block[0]), -(-n // block[1]), generator=draw) < 0.6
    allowed = torch.rand(batch, heads, s, n, generator=draw) < 0.5
    allowed[:, :, : s // 2] = True
    allowed[:, :, :, : n // 3] = False
    mask = BlockMask.from_map(
        on, s, n, block, mask=lambda b, h, q, kv: allowed[b, h, q, kv], batch=batch, heads=heads
    )
    spread = on.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)
    check_lists(mask, spread[:, :, :s, :n] & allowed)
    table = mask.table
    if table is not None:
        assert len(table.unique(dim=0)) == len(table)


def test_without_a_mask_all_blocks_are_full() -> None:
    on = torch.rand(2, 3, 5, 4) < 0.5
    for trim in (False, True):
        mask = BlockMask.from_map(on, 70, 50, 16, trim=trim)
        assert mask.table is None and mask.partial_index.shape[-1] == 0
        assert torch.equal(mask.visible()[:, :, ::16, ::16], on)
        assert mask.full_index.shape[-1] == (int(on.sum(-1).max()) if trim else 4)
        assert mask.density == pytest.approx(float(on.float().mean())) and mask.full_share == 1


def test_index_order_is_rising() -> None:
    mask = BlockMask.from_map(torch.rand(9, 9) < 0.5, 144, 144, 16)
    for row, length in zip(mask.full_index[0, 0].tolist(), mask.full_count[0, 0], strict=True):
        assert row[:length] == sorted(row[:length])


def test_lengths_hide_keys_and_leave_blocks_full() -> None:
    """A block whose valid keys are all seen is full, whatever the mask says behind them."""
    lengths = torch.tensor([[16, 5, 0], [16, 16, 3]])
    mask = BlockMask.from_map(
        torch.ones(2, 3, dtype=torch.bool), 32, 40, 16, lengths=lengths,
        mask=lambda b, h, q, kv: kv % 16 < 16 * (kv < 32) + 3 * (kv >= 32),
    )  # fmt: skip
    assert mask.table is None and mask.full_count.tolist() == [[[3, 3]]]
    seen = mask.visible()
    assert seen.shape == (2, 1, 32, 40)
    assert seen[:, 0, 0].sum(-1).tolist() == [21, 35]


@pytest.mark.parametrize("reader", ["none", "batch", "head", "both"])
def test_a_mask_is_asked_for_the_entries_it_reads(reader: str) -> None:
    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        shift = 0 if reader == "none" else b if reader == "batch" else h
        return (q + kv + (b + h if reader == "both" else shift)) % 3 > 0

    batch, heads = 2, 3
    on = torch.ones(2, 2, dtype=torch.bool)
    found = BlockMask.from_map(on, 20, 20, 16, mask=mask, batch=batch, heads=heads)
    reads_b, reads_h = reader in ("batch", "both"), reader in ("head", "both")
    assert reads(mask, 0, on.device) == reads_b and reads(mask, 1, on.device) == reads_h
    assert found.full_count.shape[:2] == (batch if reads_b else 1, heads if reads_h else 1)
    b, h, q, kv = torch.meshgrid(*map(torch.arange, (batch, heads, 20, 20)), indexing="ij")
    assert torch.equal(found.visible().expand(batch, heads, -1, -1), mask(b, h, q, kv))


def test_bits_survive_packing() -> None:
    for keys in (1, 16, 31, 32, 33, 64, 128):
        seen = torch.rand(7, 5, keys) < 0.5
        words = pack_bits(seen)
        assert words.dtype == torch.int32 and words.shape == (7, 5, -(-keys // 32))
        assert torch.equal(unpack_bits(words, keys), seen)


# --- seen from the keys --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_transposed_lists_hold_the_same_pairs(seed: int) -> None:
    dice = Random(seed)
    mask = draw_mask(dice, 2, 3)
    keys = mask.transposed()
    assert mask.transposed() is keys
    for start, index, bits, expected in (
        (keys.full_start, keys.full_index, None, listed(mask.full_count, mask.full_index)),
        (
            keys.partial_start, keys.partial_index, keys.partial_bits,
            listed(mask.partial_count, mask.partial_index, mask.partial_bits),
        ),
    ):  # fmt: skip
        found = {}
        b, h, ends = start.shape
        for at in torch.cartesian_prod(*map(torch.arange, (b, h, ends - 1))).tolist():
            *lists, key = at
            part = slice(int(start[tuple(at)]), int(start[(*lists, key + 1)]))
            queries = index[(*lists, part)].tolist()
            assert queries == sorted(queries)
            held = [[]] * len(queries) if bits is None else bits[(*lists, part, None)].tolist()
            found |= {(*lists, i, key): x for i, x in zip(queries, held, strict=True)}
        assert found == expected


def test_a_moved_mask_is_the_same_and_makes_its_own_key_lists() -> None:
    mask = draw_mask(Random(3), 2, 2)
    keys = mask.transposed()
    moved = mask.to("cpu")
    assert torch.equal(moved.visible(), mask.visible())
    assert moved.transposed() is not keys


def test_no_tokens_at_all() -> None:
    mask = BlockMask.from_map(torch.ones(0, 2, dtype=torch.bool), 0, 20)
    assert mask.visible().shape == (1, 1, 0, 20) and mask.density == 0
    assert mask.transposed().full_start.tolist() == [[[0, 0, 0]]]
    mask = BlockMask.from_map(torch.ones(2, 0, dtype=torch.bool), 20, 0)
    assert mask.visible().shape == (1, 1, 20, 0) and mask.transposed().full_start.tolist() == [
        [[0]]
    ]


# --- what it refuses -----------------------------------------------------------------------------


def test_block_sizes_are_inferred() -> None:
    for tokens, size in ((1, 16), (16, 16), (100, 32), (1000, 128), (4096, 64)):
        assert infer_block(tokens, -(-tokens // size), "key") == size
    assert infer_block(100, 1, "key") == 128
    for tokens, blocks in ((100, 3), (100, 8), (100, 0)):
        with pytest.raises(MethodError, match=f"{blocks} key blocks, but {tokens} tokens"):
            infer_block(tokens, blocks, "key")


def test_bad_input_is_named() -> None:
    on = torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(MethodError, match=r"bool \[nq, nk\].*float32"):
        BlockMask.from_map(on.float(), 32, 32)
    with pytest.raises(MethodError, match=r"got torch.bool \(2,\)"):
        BlockMask.from_map(on[0], 32, 32)
    with pytest.raises(MethodError, match="power of two of at least 16 tokens, got 24"):
        BlockMask.from_map(on, 48, 48, 24)
    with pytest.raises(MethodError, match="are 3 x 2 blocks, got a map of 2 x 2"):
        BlockMask.from_map(on, 40, 32, 16)
    with pytest.raises(MethodError, match="must return bool, one answer a pair, got torch.int64"):
        BlockMask.from_map(on, 32, 32, mask=lambda b, h, q, kv: q + kv)
    with pytest.raises(MethodError, match=r"lengths of a block mask of 2 x 2 blocks.*\(1, 2\)"):
        BlockMask.from_map(on, 32, 32, lengths=torch.ones(1, 3))
    good = BlockMask.from_map(on, 32, 32)
    with pytest.raises(MethodError, match=r"full_count .* must be int32"):
        BlockMask(32, 32, 16, 16, good.full_count.long(), *[good.full_index] * 4)
    part = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    with pytest.raises(MethodError, match="full_count on cpu and lengths on meta"):
        BlockMask.from_map(on, 32, 32, lengths=torch.ones(1, 2, device="meta"))
    with pytest.raises(MethodError, match="needs the table"):
        BlockMask(
            32, 32, 16, 16, good.full_count, good.full_index, good.full_count, part, part
        )  # fmt: skip
