"""The tensors of block lists in the form in which kernels take them."""

from __future__ import annotations

from torch import Tensor

from vistoken.kernels.block_mask import BlockMask


def key_block_lists(mask: BlockMask) -> tuple[Tensor | None, ...]:
    """Return the lists of a mask in the order in which kernels over queries take them."""
    lists = (
        mask.full_count, mask.full_index,
        mask.partial_count, mask.partial_index, mask.partial_bits, mask.table, mask.lengths,
    )  # fmt: skip
    return tuple(x if x is None else x.contiguous() for x in lists)


def list_strides(mask: BlockMask) -> tuple[int, int, int]:
    """Return how many lists lie between batch entries and heads, and lengths between the former."""
    b, h, nq = mask.full_count.shape
    shared = mask.lengths is None or mask.lengths.shape[0] == 1
    return (0 if b == 1 else h * nq), (0 if h == 1 else nq), (0 if shared else mask.kv_blocks)
