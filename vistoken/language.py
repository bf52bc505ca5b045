"""What a method may know of the prompt's text and of the LLM's attention to the picture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Text:
    """The text behind the pictures of a row: question, format instruction, role marks.

    embeddings [I, T, C] in the model's dtype; mask [I, T] bool, False where a shorter text is
    padded: on the left, so that the last token of the prompt is always the last. A row without
    text behind its last picture gives all its text.
    """

    embeddings: Tensor
    mask: Tensor


class LanguageRows:
    """Attention of one LLM layer, in fp32, for chosen query rows only: no map is materialised.

    Implemented by the host; every property is computed on first use. Queries and keys are those
    the layer uses (rotated); key heads are repeated to the H query heads. Text tokens are those
    of `Text`, padded on the left.
    """

    text_mask: Tensor  # [I, T] bool

    @property
    def text_attention(self) -> Tensor:
        """Probabilities [I, H, T, N], softmax over all keys, of text rows to visual columns.

        Rows of padding are zero.
        """
        raise NotImplementedError

    @property
    def text_to_text(self) -> Tensor:
        """Probabilities [I, H, T, T], softmax over all keys, of text rows to text columns."""
        raise NotImplementedError

    @property
    def last_attention(self) -> Tensor:
        """Probabilities [I, H, N], softmax over all keys, of the prompt's last token."""
        raise NotImplementedError

    @property
    def gravity(self) -> Tensor:
        """Product [I, T, N] of all-ones queries and keys after rotation, times D ** -0.5."""
        raise NotImplementedError

    @property
    def last_query(self) -> Tensor:
        """Query [I, H, D] of the prompt's last token."""
        raise NotImplementedError

    @property
    def last_value(self) -> Tensor:
        """Value [I, H, D] of the prompt's last token."""
        raise NotImplementedError

    @property
    def keys(self) -> Tensor:
        """Keys [I, H, N, D] of the visual tokens."""
        raise NotImplementedError

    @property
    def values(self) -> Tensor:
        """Values [I, H, N, D] of the visual tokens."""
        raise NotImplementedError
