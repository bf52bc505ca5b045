"""Operations on tensors: they know nothing of methods or models."""

from vistoken._folders import open_folder

open_folder(globals())

from vistoken.kernels.attention_row import attention_row  # noqa: E402
from vistoken.kernels.gather import gather_tokens  # noqa: E402
from vistoken.kernels.quota import split_quota  # noqa: E402

__all__ = ["attention_row", "gather_tokens", "split_quota"]
