"""Which keys a query of a grid sees: the arithmetic that all backends of local attention share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from operator import index
from typing import Any

import torch
from torch import Tensor

from vistoken.errors import MethodError


@dataclass(frozen=True)
class Axis:
    """The window of one axis without dilation: query x of `length` sees keys lo(x) <= y < hi(x).

    kernel: keys in a window; stride: consecutive queries that share one; causal: keys after the
    query are hidden. The window is shifted at the borders, never cut. With `radius` set, the
    window is that of a disc instead: cut at the borders, |x - y| < radius.
    """

    length: int
    kernel: int
    stride: int = 1
    causal: bool = False
    radius: int = 0

    def lo(self, x: int) -> int:
        """Return the first key that query x sees."""
        if self.radius:
            return max(x - self.radius + 1, 0)
        group = x // self.stride * self.stride
        if self.causal:
            return max(min(group + self.stride - 1, self.length - 1) - self.kernel + 1, 0)
        leader = min(group + self.stride // 2, self.length - 1)
        return min(max(leader - self.kernel // 2, 0), self.length - self.kernel)

    def hi(self, x: int) -> int:
        """Return the key after the last that query x sees."""
        if self.radius:
            return min(x + self.radius, self.length)
        return x + 1 if self.causal else self.lo(x) + self.kernel

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Return [lo, hi) that holds every key seen by the queries first..last, both included."""
        return self.lo(first), self.hi(last)

    def shared(self, first: int, last: int) -> tuple[int, int]:
        """Return [lo, hi) of the keys that each of the queries first..last sees; may be empty."""
        return self.lo(last), self.hi(first)

    def seen_by(self, first: int, last: int) -> tuple[int, int]:
        """Return [lo, hi) that holds every query which sees one of the keys first..last.

        Both bounds of a window rise with the query, so the queries that see a key are an interval.
        """
        return self._first_with(lambda x: self.hi(x) > first), self._first_with(
            lambda x: self.lo(x) > last
        )

    def _first_with(self, holds: Callable[[int], bool]) -> int:
        """The first query at which a condition holds that stays true after it; length if none."""
        low, high = 0, self.length
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        return low

    @property
    def full(self) -> bool:
        """Whether every query sees every key of the axis."""
        if self.radius:
            return self.radius >= self.length
        return self.kernel == self.length and (self.length == 1 or not self.causal)

    def bounds(self) -> Tensor:
        """Return (lo, hi) of every query, int64 [2, length]."""
        return torch.tensor([[f(x) for x in range(self.length)] for f in (self.lo, self.hi)])


@dataclass(frozen=True)
class Window:
    """The windows of a grid of three axes, without dilation: a query sees a box, or a disc in it.

    radius: 0, or the radius of a disc over the axes whose `radius` is set: of the box only keys
    with a squared distance below radius**2 are seen.
    """

    axes: tuple[Axis, Axis, Axis]
    radius: int = 0

    @property
    def grid(self) -> tuple[int, int, int]:
        a, b, c = self.axes
        return a.length, b.length, c.length

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def full(self) -> bool:
        """Whether the window is the grid, so that attention is dense."""
        if self.radius:
            reach = sum((axis.length - 1) ** 2 for axis in self.axes if axis.radius)
            return reach < self.radius**2
        return all(axis.full for axis in self.axes)

    def visible(self, device: torch.device | str | None = None) -> Tensor:
        """Return bool [tokens, tokens], query by key, row-major: for small grids."""
        seen = torch.ones(1, 1, dtype=torch.bool)
        distance = torch.zeros(1, 1, dtype=torch.int64)
        for axis in self.axes:
            lo, hi = axis.bounds()
            y = torch.arange(axis.length)
            one = (y >= lo[:, None]) & (y < hi[:, None])
            gap = (y[:, None] - y).square() if axis.radius else torch.zeros_like(one, dtype=y.dtype)
            seen = _outer(seen, one, torch.logical_and)
            distance = _outer(distance, gap, torch.add)
        if self.radius:
            seen = seen & (distance < self.radius**2)
        return seen.to(device)


def _outer(left: Tensor, right: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[a, a] and [b, b] to [a*b, a*b], as a Kronecker product with another operation."""
    whole = combine(left[:, None, :, None], right[None, :, None, :])
    return whole.reshape(left.shape[0] * right.shape[0], -1)


# --- what the caller gives -----------------------------------------------------------------------


@dataclass(frozen=True)
class Neighborhood:
    """Neighborhood attention as NATTEN defines it, on a grid of one to three axes.

    grid, kernel_size, stride, dilation, is_causal: one entry per axis. Use `neighborhood` to check
    and complete what a user gives.
    """

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    def groups(self) -> Iterator[tuple[tuple[slice, ...], Window]]:
        """Yield the dilation groups: the slices of the grid's axes and the window of the slice.

        A dilated neighborhood is a plain one on each interleaved sub-grid; the sub-grids together
        hold every token once.
        """
        for starts in product(*map(range, self.dilation)):
            slices = tuple(slice(g, None, d) for g, d in zip(starts, self.dilation, strict=True))
            axes = [
                Axis(-(-(length - g) // d), k, s, c)
                for length, g, d, k, s, c in zip(
                    self.grid, starts, self.dilation, self.kernel_size, self.stride,
                    self.is_causal, strict=True,
                )
            ]  # fmt: skip
            yield slices, Window((*[Axis(1, 1)] * (3 - len(axes)), *axes))  # type: ignore[arg-type]


def disc_window(grid: Sequence[int], radius: int) -> Window:
    """Return the window of a disc of `radius` on a grid (height, width): squared distance < r^2."""
    grid = _lengths(grid)
    if len(grid) != 2 or min(grid) < 1:
        raise MethodError(f"A disc needs a grid (height, width) of at least 1 x 1, got {grid}.")
    if not isinstance(radius, int) or radius < 1:
        raise MethodError(f"The radius of a disc is an integer of at least 1, got {radius!r}.")
    height, width = (Axis(length, length, radius=radius) for length in grid)
    return Window((Axis(1, 1), height, width), radius)


def neighborhood(
    grid: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Neighborhood:
    """Return a checked `Neighborhood`; raises `MethodError` naming argument, value and limit.

    Per axis of length L: 1 <= kernel_size, kernel_size * dilation <= L, 1 <= stride <= kernel_size.
    """
    grid = _lengths(grid)
    rank = len(grid)
    if rank not in (1, 2, 3) or any(length < 1 for length in grid):
        raise MethodError(f"A grid has one to three axes of at least one token, got {grid}.")
    kernels = _per_axis("kernel_size", kernel_size, rank, int)
    strides = _per_axis("stride", stride, rank, int)
    dilations = _per_axis("dilation", dilation, rank, int)
    causal = _per_axis("is_causal", is_causal, rank, bool)
    for i, (length, k, s, d) in enumerate(zip(grid, kernels, strides, dilations, strict=True)):
        if k < 1:
            raise MethodError(f"kernel_size must be at least 1, got {k} on axis {i}.")
        if d < 1 or k * d > length:
            raise MethodError(
                f"kernel_size * dilation must lie between kernel_size and the axis' {length} "
                f"tokens, got {k} * {d} on axis {i}."
            )
        if not 1 <= s <= k:
            raise MethodError(f"stride must lie in 1..kernel_size = {k}, got {s} on axis {i}.")
    return Neighborhood(grid, kernels, strides, dilations, causal)


def _lengths(grid: Sequence[int]) -> tuple[int, ...]:
    """The lengths of the axes as numbers, where a compiler may have symbols for them."""
    if not all(isinstance(length, (int, torch.SymInt)) for length in grid):
        raise MethodError(f"A grid has whole numbers of tokens, got {grid}.")
    return tuple(index(length) for length in grid)


def _per_axis(name: str, value: Any, rank: int, kind: type) -> tuple[Any, ...]:
    """One entry per axis of `value`, which is one entry or a sequence of them."""
    entries = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    wrong = [x for x in entries if not isinstance(x, kind) or (kind is int and x is True)]
    if len(entries) != rank or wrong:
        raise MethodError(
            f"{name} must be one {kind.__name__} or {rank} of them, one per axis, got {value!r}."
        )
    return entries


# --- what an operator's schema can hold ----------------------------------------------------------


def flatten_window(window: Window) -> list[int]:
    """Return a window as whole numbers, the form in which a custom operator takes it."""
    entries = [(a.length, a.kernel, a.stride, int(a.causal), a.radius) for a in window.axes]
    return [number for entry in entries for number in entry] + [window.radius]


def restore_window(flat: Sequence[int]) -> Window:
    """Return the window that `flatten_window` wrote."""
    axes = [
        Axis(length, kernel, stride, bool(causal), radius)
        for length, kernel, stride, causal, radius in (flat[i : i + 5] for i in (0, 5, 10))
    ]
    return Window((axes[0], axes[1], axes[2]), flat[15])
