"""Operations on tensors: they know nothing of methods or models."""

from vistoken._folders import open_folder

open_folder(globals())

from vistoken.kernels.attention_row import attention_received, attention_row  # noqa: E402
from vistoken.kernels.gather import gather_tokens  # noqa: E402
from vistoken.kernels.greedy import cosine_matrix, pick_diverse  # noqa: E402
from vistoken.kernels.merge import MergePlan, match, merge, released_order, unmerge  # noqa: E402
from vistoken.kernels.quota import split_quota  # noqa: E402

__all__ = [
    "MergePlan",
    "attention_received",
    "attention_row",
    "cosine_matrix",
    "gather_tokens",
    "match",
    "merge",
    "pick_diverse",
    "released_order",
    "split_quota",
    "unmerge",
]
