"""Small projectors of every structure: what hosts hand over, and what is none of them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Root(nn.Module):
    """RMSNorm as transformers' language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x32.to(x.dtype)


class Two(nn.Module):
    """linear_1, act, linear_2, with a LayerNorm in front on demand."""

    def __init__(self, e: int, h: int, c: int, act: nn.Module, norm: bool = False) -> None:
        super().__init__()
        if norm:
            self.layer_norm = nn.LayerNorm(e)
        self.linear_1, self.act, self.linear_2 = nn.Linear(e, h), act, nn.Linear(h, c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x) if hasattr(self, "layer_norm") else x
        return self.linear_2(self.act(self.linear_1(x)))


class RootMerger(nn.Module):
    """ln_q per patch, then an MLP over 4 patches."""

    def __init__(self, e: int, h: int, c: int, norm: nn.Module) -> None:
        super().__init__()
        self.width, self.ln_q = e, norm
        self.mlp = nn.Sequential(nn.Linear(e, h), nn.GELU(), nn.Linear(h, c))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).view(-1, self.width))


class Merger(nn.Module):
    """norm per patch, then linear_fc1, act_fn, linear_fc2 over 4 patches."""

    def __init__(self, e: int, h: int, c: int) -> None:
        super().__init__()
        self.width, self.norm, self.act_fn = e, nn.LayerNorm(e // 4), nn.GELU()
        self.linear_fc1, self.linear_fc2 = nn.Linear(e, h), nn.Linear(h, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.act_fn(self.linear_fc1(self.norm(x).view(-1, self.width))))


class Wrapped(nn.Module):
    """What a host may put around a merger: [..., E] to [..., C]."""

    def __init__(self, merger: nn.Module, patch: int) -> None:
        super().__init__()
        self.merger, self.patch = merger, patch

    def forward(self, x: Tensor) -> Tensor:
        return self.merger(x.reshape(-1, self.patch)).reshape(*x.shape[:-1], -1)


class Gated(nn.Module):
    """A projector of a structure that the closed form does not know."""

    def __init__(self, e: int, h: int, c: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(e, h), nn.Linear(e, h), nn.Linear(h, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every weight drawn anew: norms get scales and shifts that matter."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=draw) + (weight.dim() == 1))
    return module


E, H, C = 12, 20, 7
KNOWN: dict[str, Callable[[], nn.Module]] = {
    "llava": lambda: Two(E, H, C, nn.GELU()),
    "odd hidden": lambda: Two(E, 18, C, nn.GELU()),
    "quick gelu": lambda: Two(E, H, C, Quick()),
    "silu": lambda: Two(E, H, C, nn.SiLU()),
    "relu": lambda: Two(E, H, C, nn.ReLU()),
    "internvl": lambda: Two(E, H, C, nn.GELU(), norm=True),
    "qwen2.5": lambda: Wrapped(RootMerger(E, H, C, Root(3)), 3),
    "qwen2": lambda: Wrapped(RootMerger(E, H, C, nn.LayerNorm(3)), 3),
    "torch rms": lambda: Wrapped(RootMerger(E, H, C, nn.RMSNorm(3, eps=1e-6)), 3),
    "no affine": lambda: Wrapped(RootMerger(E, H, C, nn.LayerNorm(3, elementwise_affine=False)), 3),
    "qwen3": lambda: Wrapped(Merger(E, H, C), 3),
    "sequence": lambda: nn.Sequential(nn.Linear(E, H, bias=False), nn.Tanh(), nn.Linear(H, C)),
    "normed sequence": lambda: nn.Sequential(
        nn.LayerNorm(E, bias=False), nn.Linear(E, H), nn.GELU("tanh"), nn.Linear(H, C)
    ),
    "linear": lambda: nn.Linear(E, C),
    "wrapped linear": lambda: nn.Sequential(nn.Linear(E, C)),
}


class Scaled(Two):
    def __init__(self) -> None:
        super().__init__(E, H, C, nn.GELU())
        self.scale = nn.Parameter(torch.ones(C))


class Softened(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "gated": lambda: Gated(E, H, C),
    "a weight of its own": Scaled,
    "linear that is none": lambda: nn.Sequential(Softened(E, H), nn.GELU(), nn.Linear(H, C)),
    "norm of another kind": lambda: nn.Sequential(
        nn.GroupNorm(2, E), nn.Linear(E, H), nn.GELU(), nn.Linear(H, C)
    ),
    "three layers": lambda: nn.Sequential(nn.Linear(E, H), nn.GELU(), nn.Linear(H, H), nn.GELU()),
    "softmax": lambda: nn.Sequential(nn.Linear(E, H), nn.Softmax(-1), nn.Linear(H, C)),
    "trained activation": lambda: nn.Sequential(nn.Linear(E, H), nn.PReLU(), nn.Linear(H, C)),
}


def real_projectors() -> dict[str, nn.Module]:
    pytest.importorskip("transformers")
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    config = SimpleNamespace(
        **{"vision_feature_layer": -2, "multimodal_projector_bias": True, "downsample_ratio": 0.5},
        **{"projector_hidden_act": "gelu", "hidden_size": 3, "spatial_merge_size": 2},
        **{"text_config": SimpleNamespace(hidden_size=H), "out_hidden_size": C},
    )
    wide = SimpleNamespace(**{**vars(config), "vision_config": SimpleNamespace(hidden_size=E)})
    patch = SimpleNamespace(**{**vars(config), "vision_config": SimpleNamespace(hidden_size=3)})
    return {
        "llava": LlavaMultiModalProjector(wide),
        "internvl": InternVLMultiModalProjector(patch),
        "qwen2.5": Wrapped(Qwen2_5_VLPatchMerger(C, 3), 3),
        "qwen3": Wrapped(Qwen3VLVisionPatchMerger(config), 3),
    }
