"""Visual-token pruning methods, one file each, found by file name."""

from vistoken.pruning._pruner import Pruner, tokens_to_keep, top_indices

__all__ = ["Pruner", "tokens_to_keep", "top_indices"]
