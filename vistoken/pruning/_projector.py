"""What a projector is made of, and a copy of it that computes in fp32."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Norm:
    """LayerNorm (`centered`) or RMSNorm over groups of `width` neighboring inputs."""

    width: int
    eps: float
    scale: Tensor | None
    shift: Tensor | None
    centered: bool


@dataclass(frozen=True)
class Layout:
    """Norm (if any), linear, activation, linear; of a linear projector `first` alone.

    core: the module that holds them, inside what may be wrapped around it.
    """

    core: nn.Module
    norm: Norm | None
    first: nn.Linear
    act: nn.Module | None = None
    second: nn.Linear | None = None

    @property
    def groups(self) -> int:
        """Into how many groups the norm splits the input of one token."""
        return 1 if self.norm is None else self.first.in_features // self.norm.width


# names of norm, first linear, activation, second linear inside the module
_NAMES: tuple[tuple[str | None, str, str, str], ...] = (
    (None, "linear_1", "act", "linear_2"),
    ("layer_norm", "linear_1", "act", "linear_2"),
    ("norm", "linear_fc1", "act_fn", "linear_fc2"),
    ("ln_q", "mlp.0", "mlp.1", "mlp.2"),
)
_SEQUENTIAL: tuple[tuple[str | None, str, str, str], ...] = (
    (None, "0", "1", "2"),
    ("0", "1", "2", "3"),
)


def find_layout(projector: nn.Module) -> Layout | None:
    """Recognize a projector by the names and types of its layers; None if it is another one.

    Modules with a single child are looked through: a wrapper may only reshape.
    """
    core = projector
    while len(inside := list(core.children())) == 1 and not list(core.parameters(recurse=False)):
        core = inside[0]
    if _is_linear(core):
        return Layout(core, None, core)
    leaves = {name for name, layer in core.named_modules() if not list(layer.children())}
    holders = {name.rpartition(".")[0] for name, _ in core.named_parameters()}
    for names in _SEQUENTIAL if isinstance(core, nn.Sequential) else _NAMES:
        if leaves == {name for name in names if name} and holders <= leaves:
            return _layout(core, *names)
    return None


def _layout(core: nn.Module, norm: str | None, first: str, act: str, second: str) -> Layout | None:
    linear_1, linear_2 = core.get_submodule(first), core.get_submodule(second)
    if not (_is_linear(linear_1) and _is_linear(linear_2)):
        return None
    found = _norm(core.get_submodule(norm)) if norm else None
    if norm and (found is None or linear_1.in_features % found.width):
        return None
    if linear_1.out_features != linear_2.in_features:
        return None
    return Layout(core, found, linear_1, core.get_submodule(act), linear_2)


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether the layer is x W^T + b with W as it lies there; quantized layers are not."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return False
    shape = (layer.out_features, layer.in_features)
    return layer.weight.is_floating_point() and tuple(layer.weight.shape) == shape


def _norm(layer: nn.Module) -> Norm | None:
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        return Norm(layer.normalized_shape[0], layer.eps, layer.weight, layer.bias, True)
    if isinstance(layer, nn.RMSNorm) and len(layer.normalized_shape) == 1:
        default = torch.finfo(torch.float32).eps
        eps = default if layer.eps is None else layer.eps
        return Norm(layer.normalized_shape[0], eps, layer.weight, None, False)
    # the RMSNorm of transformers' Llama-like models, each a class of its own
    epsilon, weight = getattr(layer, "variance_epsilon", None), getattr(layer, "weight", None)
    if isinstance(epsilon, float) and isinstance(weight, Tensor) and weight.dim() == 1:
        return Norm(weight.numel(), epsilon, weight, None, False)
    return None


def fp32_twin(module: nn.Module) -> nn.Module:
    """Return a module of the same code with fp32 copies of the weights and without hooks.

    A hook on the projector belongs to the model's own calls. The module itself is only read, so
    other threads may use it meanwhile.
    """
    twin: nn.Module = module.__class__.__new__(module.__class__)
    state = {
        key: OrderedDict() if key.endswith("_hooks") else value
        for key, value in module.__dict__.items()
        if key not in ("forward", "_compiled_call_impl")  # these belong to the module itself
    }
    for kind in ("_parameters", "_buffers"):
        state[kind] = {key: _fp32(value) for key, value in module.__dict__[kind].items()}
    state["_modules"] = {
        key: child if child is None else fp32_twin(child)
        for key, child in module.__dict__["_modules"].items()
    }
    twin.__dict__.update(state)
    return twin


def _fp32(values: Tensor | None) -> Tensor | None:
    if values is None or not values.is_floating_point():
        return values
    return values.detach().float()
