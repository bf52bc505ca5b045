"""What `bench_kernels` measures: the cases, their inputs, and which key a query sees."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from vistoken import kernels
from vistoken.errors import DataError
from vistoken.kernels.block_mask import BlockMask
from vistoken.kernels.block_sparse import block_sparse_attention
from vistoken.kernels.patterns import DiscPattern, pattern_attention
from vistoken.kernels.simulate import Simulation, simulate
from vistoken.kernels.tile_advice import rank_tiles
from vistoken.kernels.windows import Axis, Neighborhood, Window, disc_window, neighborhood

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One attention over a grid, q = k = v [batch, text + tokens of the grid, heads, dim].

    kernel_size and stride: a neighborhood; radius: a disc instead; block: a block list instead with
    all blocks on. text: tokens before the grid's that see, and are seen by, all. goal: milliseconds
    of the forward on one H100, or None. natten_ms: what NATTEN publishes for one H100, its
    permutation included (documentation of 0.20), or None.
    """

    name: str
    grid: Shape
    heads: int
    dim: int = 128
    batch: int = 1
    kernel_size: Shape = ()
    stride: Shape = ()
    radius: int = 0
    block: int = 0
    text: int = 0
    goal: float | None = None
    natten_ms: float | None = None

    @property
    def tokens(self) -> int:
        """All tokens of a row of the batch, text included."""
        return self.text + math.prod(self.grid)

    @property
    def title(self) -> str:
        """The case in words, such as `2-D 256×256, k=80×80`."""

        def by(sides: Shape) -> str:
            return "×".join(map(str, sides))

        if self.block:
            return f"block list, every block on, S={self.tokens}"
        if self.radius:
            return f"disc r={self.radius} + {self.text} text, {by(self.grid)}"
        stride = f", stride {by(self.stride)}" if self.stride else ""
        return f"{len(self.grid)}-D {by(self.grid)}, k={by(self.kernel_size)}{stride}"

    @property
    def shape(self) -> Shape:
        """[batch, tokens, heads, dim]."""
        return self.batch, self.tokens, self.heads, self.dim

    def where(self) -> Neighborhood | Window:
        """Return the windows of the grid; with all blocks on, a window as large as the grid."""
        if self.radius:
            return disc_window(self.grid, self.radius)
        size = self.grid if self.block else self.kernel_size
        return neighborhood(self.grid, size, self.stride or 1)

    def axes(self) -> tuple[Axis, ...]:
        """Return the windows of the grid's axes."""
        found = self.where()
        window = found if isinstance(found, Window) else next(found.groups())[1]
        return window.axes[3 - len(self.grid) :]

    def small(self) -> Case:
        """Return the same kind of case on a grid that a CPU does in no time."""
        longest = {1: 200, 2: 14, 3: 8}[len(self.grid)]
        grid = tuple(min(length, longest + i) for i, length in enumerate(self.grid))

        def scale(sizes: Shape) -> Shape:
            shrunk = zip(sizes, self.grid, grid, strict=True)
            return tuple(max(round(n * new / old), min(n, 2)) for n, old, new in shrunk)

        return replace(
            self,
            grid=grid,
            heads=2,
            dim=min(self.dim, 64),
            batch=min(self.batch, 2),
            kernel_size=scale(self.kernel_size) if self.kernel_size else (),
            stride=scale(self.stride) if self.stride else (),
            radius=min(self.radius, 4),
            text=min(self.text, 20),
            goal=None,
            natten_ms=None,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the case as plain values, its title among them."""
        return {**asdict(self), "title": self.title}


_flux = partial(Case, grid=(256, 256), heads=24, kernel_size=(80, 80))
_hunyuan = partial(Case, grid=(30, 48, 80), heads=24, kernel_size=(18, 24, 24))
_clear = partial(Case, heads=24, radius=16, text=512)
_nat = partial(Case, heads=16, dim=64, kernel_size=(13, 13))
_ltx = partial(Case, grid=(32, 96, 96), heads=4, dim=64)
CASES = (
    _flux("2d-256-k80", goal=11.5, natten_ms=18.6),
    _flux("2d-256-k80-s16", stride=(16, 16), goal=8.5, natten_ms=10.6),
    _hunyuan("3d-30x48x80", goal=46.0, natten_ms=84.4),
    _hunyuan("3d-30x48x80-s", stride=(16, 8, 8), goal=24.0, natten_ms=29.1),
    Case("3d-21x45x80", (21, 45, 80), 40, kernel_size=(5, 13, 13), goal=10.0),
    _clear("disc-256", (256, 256), goal=4.6),
    _clear("disc-512", (512, 512), goal=18.0),
    Case("blocks", (16384,), 24, block=128, goal=5.7),
    _nat("2d-64-k13", (64, 64), batch=8, goal=0.40),
    _nat("2d-128-k13", (128, 128), batch=2, goal=0.70),
    _ltx("3d-32x96x96-k3", kernel_size=(3, 5, 5), goal=0.70),
    _ltx("3d-32x96x96-k11", kernel_size=(11, 11, 11)),
)


def choose_cases(names: str | None) -> tuple[Case, ...]:
    """Return the cases named, with commas between, or all; raises `DataError` for unknown names."""
    if not names:
        return CASES
    known = {case.name: case for case in CASES}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise DataError(f"there is no case {name!r}; the cases are {', '.join(known)}")
    return tuple(known[name] for name in wanted)


@dataclass(frozen=True)
class Inputs:
    """q, k, v and the gradient of the output, each [batch, tokens, heads, dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor

    @classmethod
    def draw(cls, case: Case, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Return normal random inputs, the same for the same seed on the same kind of device."""
        generator = torch.Generator(device).manual_seed(seed)
        return cls(
            *(
                torch.randn(case.shape, device=device, dtype=dtype, generator=generator)
                for _ in range(4)
            )
        )


def attend(
    case: Case, q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Run the case by this package: out [batch, tokens, heads, dim], lse [batch, tokens, heads]."""
    given: dict[str, Any] = {"return_lse": True, "backend": backend}
    operation: Any
    if case.block:
        operation = block_sparse_attention
        return operation(q, k, v, _all_on(case, q.device), **given)
    if case.radius:
        pattern = DiscPattern(case.grid, radius=case.radius, prefix=case.text)
        operation = pattern_attention
        return operation(q, k, v, pattern, **given)
    operation = getattr(kernels, f"na{len(case.grid)}d")
    q, k, v = (x.unflatten(1, case.grid) for x in (q, k, v))
    out, lse = operation(q, k, v, case.kernel_size, case.stride or 1, **given)
    last = len(case.grid)
    return out.flatten(1, last), lse.flatten(1, last)


@lru_cache(maxsize=2)
def _all_on(case: Case, device: torch.device) -> BlockMask:
    """The block lists with all blocks on, which callers make once."""
    blocks = -(-case.tokens // case.block)
    on = torch.ones(blocks, blocks, dtype=torch.bool, device=device)
    return BlockMask.from_map(on, case.tokens, case.tokens)


# --- which key a query sees, token by token ------------------------------------------------------


def visible(case: Case, queries: Tensor, keys: Tensor) -> Tensor:
    """Return bool [queries, keys]: which of the tokens `keys` those of `queries` see.

    Both are indices of tokens, text before the grid's, row-major.
    """
    q_text, k_text = queries < case.text, keys < case.text
    seen = torch.ones(len(queries), len(keys), dtype=torch.bool, device=queries.device)
    distance = torch.zeros((), dtype=torch.int64, device=queries.device)
    for axis, q_at, k_at in zip(
        case.axes(), coordinates(case, queries), coordinates(case, keys), strict=True
    ):
        bounds = axis.bounds().to(queries.device)
        lo, hi = bounds[0, q_at, None], bounds[1, q_at, None]
        seen &= (k_at >= lo) & (k_at < hi)
        if axis.radius:
            distance = distance + (k_at - q_at[:, None]).square()
    if case.radius:
        seen &= distance < case.radius**2
    return seen | q_text[:, None] | k_text


def coordinates(case: Case, tokens: Tensor) -> list[Tensor]:
    """Return where tokens lie along each axis of the grid; text counts as the first token."""
    rest = (tokens - case.text).clamp(min=0)
    found = []
    for length in reversed(case.grid):
        found.append(rest % length)
        rest = rest // length
    return found[::-1]


# --- work ----------------------------------------------------------------------------------------


@cache
def best_tiles(case: Case) -> Simulation:
    """Return the aligned tiles, 128 queries by 64 or 128 keys, that need the least work."""
    return rank_tiles(case.where(), mask_cost=1.0, top=1)[0]


@cache
def visible_pairs(case: Case) -> int:
    """Return how many pairs of a query and a key are visible, for one head of one row."""
    unit = (1,) * (3 if case.radius else len(case.grid))
    return simulate(case.where(), unit, unit).pairs + _text_pairs(case)


def touched_share(case: Case) -> float:
    """Return the work on the best tiles as a share of dense attention's: the block-sparse bound."""
    grid = math.prod(case.grid)
    return (best_tiles(case).share * grid**2 + _text_pairs(case)) / case.tokens**2


def _text_pairs(case: Case) -> int:
    return case.tokens**2 - math.prod(case.grid) ** 2


def forward_flops(case: Case) -> int:
    """Return the floating-point operations of the forward on visible pairs: 4 dim for each."""
    return 4 * visible_pairs(case) * case.dim * case.heads * case.batch
