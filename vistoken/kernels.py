"""Operations on tensors: they know nothing of methods or models."""

from vistoken._folders import open_folder

open_folder(globals())

from vistoken.kernels.attention_row import attention_received, attention_row  # noqa: E402
from vistoken.kernels.backends import BACKENDS, explain_backends, use_backend  # noqa: E402
from vistoken.kernels.band_pattern import BandPattern  # noqa: E402
from vistoken.kernels.block_mask import BlockMask  # noqa: E402
from vistoken.kernels.block_sparse import block_sparse_attention  # noqa: E402
from vistoken.kernels.gather import gather_tokens  # noqa: E402
from vistoken.kernels.greedy import cosine_matrix, pick_diverse  # noqa: E402
from vistoken.kernels.grid_attention import grid_attention  # noqa: E402
from vistoken.kernels.merge import MergePlan, match, merge, released_order, unmerge  # noqa: E402
from vistoken.kernels.merge_attentions import merge_attentions  # noqa: E402
from vistoken.kernels.neighborhood import na1d, na2d, na3d  # noqa: E402
from vistoken.kernels.patterns import (  # noqa: E402
    DiscPattern,
    SlidingTilePattern,
    WindowPattern,
    pattern_attention,
)
from vistoken.kernels.quota import split_quota  # noqa: E402
from vistoken.kernels.region_pattern import RegionPattern  # noqa: E402
from vistoken.kernels.simulate import Simulation, simulate  # noqa: E402
from vistoken.kernels.windows import (  # noqa: E402
    Neighborhood,
    Window,
    disc_window,
    neighborhood,
)

__all__ = [
    "BACKENDS",
    "BandPattern",
    "BlockMask",
    "DiscPattern",
    "MergePlan",
    "Neighborhood",
    "RegionPattern",
    "Simulation",
    "SlidingTilePattern",
    "Window",
    "WindowPattern",
    "attention_received",
    "attention_row",
    "block_sparse_attention",
    "cosine_matrix",
    "disc_window",
    "explain_backends",
    "gather_tokens",
    "grid_attention",
    "match",
    "merge",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood",
    "pattern_attention",
    "pick_diverse",
    "released_order",
    "simulate",
    "split_quota",
    "unmerge",
    "use_backend",
]
