"""The tiny LLaVA of `train_tiny_llava.py`: sizes, tokenizer, processor, and its two forward passes.

Everything here is a stock transformers class; the auxiliary heads exist only while training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tiny_llava_data import Batch
from vistoken.eval.scenes import COLORS, KINDS, SIZE, vocabulary

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
MOST_THINGS = 8
PREFIX = 3  # <bos> user :
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model: width and heads are shared by the tower and the language model."""

    hidden: int = 192
    heads: int = 6
    tower_layers: int = 8
    text_layers: int = 8
    text_inner: int = 512
    patch: int = 14

    @property
    def grid(self) -> int:
        """Patches along one side of the picture."""
        return SIZE // self.patch


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the scenes' vocabulary, lower-cased; punctuation stands alone."""
    words = [*SPECIAL, *vocabulary()]
    table = {w: i for i, w in enumerate(words)}
    inner = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", table["<bos>"])]
    )
    # Spaces between words, none before punctuation.
    inner.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(sizes: Sizes) -> LlavaProcessor:
    """A stock LLaVA processor; pictures are resized to 336 x 336 and never cropped."""
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=sizes.patch,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def build_model(sizes: Sizes) -> LlavaForConditionalGeneration:
    """A stock `LlavaForConditionalGeneration` of the given sizes with random weights."""
    words = len(SPECIAL) + len(vocabulary())
    vision = CLIPVisionConfig(
        hidden_size=sizes.hidden,
        intermediate_size=4 * sizes.hidden,
        projection_dim=sizes.hidden,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.heads,
        image_size=SIZE,
        patch_size=sizes.patch,
    )
    text = LlamaConfig(
        vocab_size=-(-words // 64) * 64,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.text_inner,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=sizes.grid**2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=64
    )
    return model


@dataclass
class Seen:
    """What the tower gives: patch features [B, N, C], its [CLS] at the feature layer and at the
    end [B, C], and the [CLS] attention row of the feature layer, mean over heads [B, N]."""

    features: Tensor
    cls: Tensor
    cls_end: Tensor
    attention: Tensor


def vision_parts(model: LlavaForConditionalGeneration) -> nn.Module:
    """The CLIP vision transformer; some versions of transformers wrap it once more."""
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> Seen:
    """Run the tower on normalised pixels [B, 3, 336, 336], reading the feature layer on the way."""
    vit = vision_parts(model)
    hidden = vit.pre_layrnorm(vit.embeddings(pixels))
    layers = vit.encoder.layers
    for i, layer in enumerate(layers):
        if i == len(layers) - 2:
            row = _cls_row(layer, hidden)
        elif i == len(layers) - 1:
            features = hidden
        hidden = layer(hidden, attention_mask=None)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return Seen(features[:, 1:], features[:, 0], vit.post_layernorm(hidden[:, 0]), row)


def _cls_row(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Attention of [CLS] to the patches in one layer, in float32, mean over heads: [B, N]."""
    x, attention = layer.layer_norm1(hidden), layer.self_attn
    b, n, c = x.shape
    heads = attention.num_heads
    q = attention.q_proj(x[:, 0]).view(b, heads, c // heads)
    k = attention.k_proj(x).view(b, n, heads, c // heads)
    scores = torch.einsum("bhd,bnhd->bhn", q, k).float() / (c // heads) ** 0.5
    return scores.softmax(dim=-1).mean(dim=1)[:, 1:]


class Teacher(nn.Module):
    """The heads and losses that teach the tower; thrown away after training.

    From each patch: the kind (or background) and color of its owner, the owner's center, its rank
    by size, and the patch's own row and column, so that position survives when tokens move. From
    [CLS], at the feature layer and at the end: which kinds, and which kinds in which colors, are
    in the picture. And the [CLS] attention row itself should lie on the patches of things.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        g = sizes.grid
        self.split = (len(KINDS) + 1, len(COLORS), g, g, MOST_THINGS, g, g)
        self.norm = nn.LayerNorm(sizes.hidden)
        self.patch = nn.Linear(sizes.hidden, sum(self.split))
        many = len(KINDS) * (1 + len(COLORS))
        self.norm_cls = nn.LayerNorm(sizes.hidden)
        self.cls = nn.Linear(sizes.hidden, many)
        self.cls_end = nn.Linear(sizes.hidden, many)
        for head in (self.cls, self.cls_end):
            nn.init.constant_(head.bias, -3.0)  # most kinds are absent
        place = torch.arange(g * g)
        self.register_buffer("row", place // g, persistent=False)
        self.register_buffer("column", place % g, persistent=False)

    def forward(self, seen: Seen, batch: Batch) -> dict[str, Tensor]:
        """The losses by name, each a scalar."""
        owner, things = batch.owner.long(), batch.things.long()
        b = owner.shape[0]
        owned = owner >= 0
        table = things[torch.arange(b, device=owner.device)[:, None], owner.clamp(min=0)]
        labels = table.masked_fill(~owned[..., None], -100)  # [B, N, 5]
        kind = table[..., 0].masked_fill(~owned, len(KINDS))
        # Every thing counts the same whatever its size, up to a square root.
        size = torch.zeros(b, MOST_THINGS, device=owner.device)
        size = size.scatter_add(1, owner.clamp(min=0), owned.float())
        each = owned / size.gather(1, owner.clamp(min=0)).clamp(min=1).sqrt()
        object_weight = each / each.sum()
        weight = 0.75 * object_weight + 0.25 * (~owned) / (~owned).sum()
        logits = self.patch(self.norm(seen.features)).float().split(self.split, dim=-1)

        def loss(i: int, target: Tensor, w: Tensor) -> Tensor:
            flat = logits[i].flatten(0, 1)
            terms = F.cross_entropy(flat, target.flatten(), reduction="none", ignore_index=-100)
            return (terms * w.flatten()).sum()

        even = torch.full_like(weight, 1.0 / weight.numel())
        losses = {
            "kind": loss(0, kind, weight),
            "color": loss(1, labels[..., 1], object_weight),
            "center": loss(2, labels[..., 2], object_weight)
            + loss(3, labels[..., 3], object_weight),
            "rank": loss(4, labels[..., 4], object_weight),
            "place": loss(5, self.row.expand(b, -1), even)
            + loss(6, self.column.expand(b, -1), even),
        }
        present = things[..., 0] >= 0
        pairs = len(KINDS) + things[..., 0] * len(COLORS) + things[..., 1]
        many = torch.zeros(b, self.cls.out_features + 1, device=owner.device)
        last = self.cls.out_features
        many.scatter_(1, things[..., 0].masked_fill(~present, last), 1.0)
        many.scatter_(1, pairs.masked_fill(~present, last), 1.0)
        for name, logit in (
            ("cls", self.cls(self.norm_cls(seen.cls))),
            ("cls_end", self.cls_end(seen.cls_end)),
        ):
            terms = F.binary_cross_entropy_with_logits(
                logit.float(), many[:, :last], reduction="none"
            )
            losses[name] = terms.sum(dim=1).mean()
        share = owned / owned.sum(dim=1, keepdim=True).clamp(min=1)
        losses["attention"] = -(share * seen.attention.clamp(min=1e-6).log()).sum(dim=1).mean()
        return losses


TEACHER_WEIGHTS = {
    **{"kind": 1.0, "color": 0.5, "center": 0.15, "rank": 0.15, "place": 0.05},
    **{"cls": 0.15, "cls_end": 0.05, "attention": 0.05},
}


def text_states(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    start: Tensor,
    ids: Tensor,
    segment: Tensor,
    step: Tensor,
    *,
    keep: Tensor | None = None,
    renumber: Tensor | None = None,
) -> Tensor:
    """Logits at packed text behind one image prefix: [B, T, vocabulary].

    features [B, N, C] before the projector; start [3] the ids of "<bos> user :"; ids, segment
    (0: padding) and step (position within the segment) [B, T]; every segment sees the prefix and
    itself. `keep` bool [B, N] hides the other visual tokens; rows with `renumber` bool [B] number
    the kept ones 0, 1, ..., the others keep their places. Without `keep` the features given are
    all there is.
    """
    b, n, _ = features.shape
    embed = model.get_input_embeddings()
    visual = model.model.multi_modal_projector(features)
    words = embed(torch.cat([start.expand(b, -1), ids], dim=1)).to(visual.dtype)
    hidden = torch.cat([words[:, :PREFIX], visual, words[:, PREFIX:]], dim=1)
    head = PREFIX + n
    seen = torch.ones(b, hidden.shape[1], dtype=torch.bool, device=ids.device)
    place = torch.arange(n, device=ids.device).expand(b, -1)
    count = torch.full((b, 1), n, device=ids.device)
    if keep is not None and renumber is not None:
        seen = torch.cat([seen[:, :PREFIX], keep, seen[:, head:]], dim=1)
        place = torch.where(renumber[:, None], keep.cumsum(dim=1) - 1, place).clamp(min=0)
        count = torch.where(renumber[:, None], keep.sum(dim=1, keepdim=True), count)
    first = torch.arange(PREFIX, device=ids.device).expand(b, -1)
    positions = torch.cat([first, PREFIX + place, PREFIX + count + step], dim=1)
    whose = torch.cat([torch.zeros_like(positions[:, :head]), segment.long() + 1], dim=1)
    allowed = (whose[:, None, :] == 0) | (whose[:, :, None] == whose[:, None, :])
    index = torch.arange(hidden.shape[1], device=ids.device)
    allowed = allowed & seen[:, None, :] & (index[:, None] >= index[None, :])
    out = model.model.language_model(
        inputs_embeds=hidden,
        attention_mask=allowed[:, None],
        position_ids=positions,
        use_cache=False,
    )
    return model.lm_head(out.last_hidden_state[:, head:])
