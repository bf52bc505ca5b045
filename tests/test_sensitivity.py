"""The projector's sensitivity: closed forms against Jacobians, estimators, kept matrices."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from projectors import KNOWN, UNKNOWN, C, E, H, Two, Wrapped, real_projectors, shaken
from vistoken.errors import MethodError
from vistoken.pruning import _sensitivity
from vistoken.pruning._projector import find_layout, fp32_twin
from vistoken.pruning.zeroth_order import MODES, sensitivity

every_known = pytest.mark.parametrize("name", KNOWN)


def tokens_of(batch: int, tokens: int, width: int = E, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def jacobians(projector: nn.Module, features: Tensor) -> Tensor:
    """[B, N, C, E] in fp64, by reverse-mode differentiation of one output at a time."""
    x = features.double().requires_grad_()
    y = copy.deepcopy(projector).double()(x)
    rows = [torch.autograd.grad(one.sum(), x, retain_graph=True)[0] for one in y.unbind(-1)]
    return torch.stack(rows, dim=-2)


def rms(jacobian: Tensor) -> Tensor:
    return (jacobian.square().sum((-2, -1)) / jacobian.shape[-1]).sqrt()


def error(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / expected).max())


# --- exact ---------------------------------------------------------------------------------------


@every_known
def test_exact_is_the_norm_of_the_jacobian(name: str) -> None:
    projector, features = shaken(KNOWN[name]()), tokens_of(2, 9)
    found = sensitivity(projector, features)
    assert found.dtype == torch.float32 and found.shape == (2, 9) and not found.requires_grad
    assert error(found, rms(jacobians(projector, features))) < 2e-6


@every_known
@pytest.mark.parametrize("size", [1e-3, 30.0])
def test_exact_where_the_norm_or_the_activation_saturates(name: str, size: float) -> None:
    projector, features = shaken(KNOWN[name](), seed=1), tokens_of(1, 9, seed=1) * size
    expected = rms(jacobians(projector, features))
    assert (sensitivity(projector, features) - expected).abs().max() < 2e-5 * expected.max()


def test_projectors_of_transformers() -> None:
    for name, projector in real_projectors().items():
        features, inner = tokens_of(2, 5), list(shaken(projector).children())
        expected = rms(jacobians(projector, features))
        assert error(sensitivity(projector, features), expected) < 2e-6, name
        if name.startswith("qwen"):  # the merger itself, too, which takes patches one by one
            for mode in MODES:
                found = sensitivity(inner[0], features, mode=mode)
                assert torch.equal(found, sensitivity(projector, features, mode=mode))


def test_a_linear_projector_is_equally_sensitive_everywhere() -> None:
    projector, features = nn.Linear(64, 48), tokens_of(2, 50, 64)
    expected = (projector.weight.square().sum() / 64).sqrt()
    assert error(sensitivity(projector, features), expected.expand(2, 50)) < 1e-6
    for mode, slack in (("jvp", 1e-6), ("reference", 1e-3)):
        found = sensitivity(projector, features, mode=mode)
        assert error(found, found.mean().expand(2, 50)) < slack


@pytest.mark.parametrize("name", UNKNOWN)
def test_exact_refuses_what_it_does_not_know(name: str) -> None:
    with pytest.raises(MethodError, match="mode='jvp'"):
        sensitivity(UNKNOWN[name](), tokens_of(1, 3))


def test_quantized_layers_are_not_taken_for_linear_ones() -> None:
    projector = Two(E, H, C, nn.GELU())
    projector.linear_1.weight = nn.Parameter(torch.zeros(H, E, dtype=torch.int8), False)
    with pytest.raises(MethodError, match="mode='jvp'"):
        sensitivity(projector, tokens_of(1, 3))


def test_parts_of_the_work_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llava", "qwen3"):
        projector, features = shaken(KNOWN[name]()), tokens_of(2, 20)
        whole = [sensitivity(projector, features, mode=mode, directions=5) for mode in MODES]
        for rows in (25, 200):
            monkeypatch.setattr(_sensitivity, "_ELEMENTS", rows * H)
            parts = [sensitivity(projector, features, mode=mode, directions=5) for mode in MODES]
            assert max(map(error, parts, whole)) < 1e-4


# --- jvp and reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*KNOWN, "gated"])
def test_jvp_is_the_mean_of_the_directional_derivatives(name: str) -> None:
    projector = shaken({**KNOWN, **UNKNOWN}[name]())
    features, draw = tokens_of(2, 9), torch.Generator().manual_seed(5)
    found = sensitivity(projector, features, mode="jvp", directions=11, generator=draw)
    bank = torch.randn(11, E, generator=draw.manual_seed(5)).double()
    bank = bank / bank.norm(dim=1, keepdim=True)
    moved = torch.einsum("bnce,me->bnmc", jacobians(projector, features), bank)
    assert error(found, moved.norm(dim=-1).mean(-1)) < 1e-5
    assert found.dtype == torch.float32 and not found.requires_grad


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2.5", "qwen3", "gated"])
@pytest.mark.parametrize("step", [1e-3, 1e-2])
def test_the_central_difference_is_near_the_derivative(name: str, step: float) -> None:
    torch.manual_seed(0)
    projector, features = {**KNOWN, **UNKNOWN}[name](), tokens_of(2, 20)
    exact = sensitivity(projector, features, mode="jvp")
    found = sensitivity(projector, features, mode="reference", step=step)
    assert error(found, exact) < 1e-3
    assert not torch.equal(found, exact)


def test_reference_by_hand() -> None:
    projector, features = shaken(KNOWN["llava"]()), tokens_of(1, 4)
    draw = torch.Generator().manual_seed(3)
    found = sensitivity(
        projector, features, mode="reference", directions=5, step=0.5, generator=draw
    )
    bank = torch.randn(5, E, generator=draw.manual_seed(3))
    for token in range(4):
        norms = []
        for direction in bank / bank.norm(dim=1, keepdim=True):
            ahead = projector(features[0, token] + 0.5 * direction)
            behind = projector(features[0, token] - 0.5 * direction)
            norms.append(((ahead - behind) / (2 * 0.5)).norm())
        assert abs(found[0, token] / torch.stack(norms).mean() - 1) < 1e-5


@pytest.mark.parametrize("norm", [False, True])
def test_exact_and_many_samples_agree(norm: bool) -> None:
    torch.manual_seed(0)
    projector, features = Two(128, 256, 128, nn.GELU(), norm), tokens_of(1, 24, 128)
    many = sensitivity(projector, features, mode="jvp", directions=1024)
    assert error(sensitivity(projector, features), many) < 0.02
    few = sensitivity(projector, features, mode="jvp", directions=1)
    assert error(sensitivity(projector, features), few) > 0.02


def test_a_seed_decides_and_global_numbers_are_left_alone() -> None:
    projector, features = shaken(KNOWN["llava"]()), tokens_of(1, 6)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for mode in ("jvp", "reference"):
        one = sensitivity(projector, features, mode=mode)
        assert torch.equal(one, sensitivity(projector, features, mode=mode))
        again = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        zero, other = (sensitivity(projector, features, mode=mode, generator=g) for g in again)
        assert torch.equal(one, zero) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


# --- every mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2.5", "linear"])
def test_half_precision_models_are_measured_in_fp32(name: str, mode: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        projector, features = shaken(KNOWN[name]()).to(dtype), tokens_of(1, 16).to(dtype)
        wide = copy.deepcopy(projector).float()
        with torch.autocast("cpu", torch.bfloat16):
            found = sensitivity(projector, features, mode=mode)
        assert found.dtype == torch.float32
        assert error(found, sensitivity(wide, features.float(), mode=mode)) < 1e-5
        assert {p.dtype for p in projector.parameters()} == {dtype}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_do_not_see_each_other(mode: str) -> None:
    projector, features = shaken(KNOWN["qwen3"]()), tokens_of(3, 17)
    found = sensitivity(projector, features, mode=mode)
    order = torch.randperm(17)
    assert error(sensitivity(projector, features[:, order], mode=mode), found[:, order]) < 1e-5
    alone = torch.cat([sensitivity(projector, one[None], mode=mode) for one in features])
    assert error(alone, found) < 1e-5
    features[0, 3] = torch.nan
    broken = sensitivity(projector, features, mode=mode)
    assert broken.isnan().sum() == 1 and broken[0, 3].isnan()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes_do_not_matter(mode: str, grad_mode: Callable[[], Any]) -> None:
    projector, features = shaken(KNOWN["internvl"]()), tokens_of(1, 7)
    with grad_mode():
        inside = sensitivity(projector, features.clone(), mode=mode)
    after = sensitivity(projector, features.requires_grad_(), mode=mode)
    assert torch.equal(inside, after) and not after.requires_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["llava", "qwen3", "gated"])
def test_the_model_is_left_as_it_was(name: str, mode: str) -> None:
    if (name, mode) == ("gated", "exact"):
        pytest.skip("refused, as tested above")
    projector, called = shaken({**KNOWN, **UNKNOWN}[name]()), []
    for part in projector.modules():
        part.register_forward_pre_hook(lambda *_: called.append("before"))
        part.register_forward_hook(lambda *_: called.append("after"))
    inside = [
        (part, {k: dict(v) if isinstance(v, dict) else v for k, v in vars(part).items()})
        for part in projector.modules()
    ]
    weights = [(p, p.data_ptr(), p.clone(), p._version) for p in projector.parameters()]
    sensitivity(projector, tokens_of(1, 5), mode=mode)
    assert called == []
    for part, before in inside:
        assert {k: dict(v) if isinstance(v, dict) else v for k, v in vars(part).items()} == before
    for p, pointer, value, version in weights:
        assert p.data_ptr() == pointer and p._version == version and torch.equal(p, value)
        assert p.grad is None


def test_the_twin_is_the_module_in_fp32() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval().bfloat16()
    module[0].forward = lambda x: x * 0  # what a dispatcher puts there is bound to the module
    twin = fp32_twin(module)
    assert type(twin) is nn.Sequential and {p.dtype for p in twin.parameters()} == {torch.float32}
    assert twin[1].num_batches_tracked.dtype == torch.int64
    del module[0].forward
    x = torch.randn(3, 4)
    assert torch.equal(twin(x), copy.deepcopy(module).float()(x))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "exakt"}, "'exakt'"),
        ({"directions": 0}, "at least 1"),
        ({"step": 0.0}, "above 0"),
        ({"step": float("nan")}, "above 0"),
        ({"features": torch.zeros(3, E)}, r"\[3, 12\]"),
        ({"features": torch.zeros(1, 3, E, dtype=torch.long)}, "int64"),
        ({"features": torch.zeros(1, 3, E + 3)}, "reads 12 values .* have 15"),
        ({"features": torch.zeros(1, 4, E // 2), "mode": "jvp"}, "reads 12 values .* have 6"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], words: str) -> None:
    projector = KNOWN["qwen3"]()
    with pytest.raises(MethodError, match=words):
        sensitivity(**{"projector": projector, "features": tokens_of(1, 3), **given})


# --- the kept matrices ---------------------------------------------------------------------------


def fresh(projector: nn.Module, features: Tensor) -> Tensor:
    return sensitivity(copy.deepcopy(projector), features)


def test_a_second_call_computes_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    projector, features, made = shaken(KNOWN["llava"]()), tokens_of(1, 6), []
    original = _sensitivity._blocks_of
    monkeypatch.setattr(
        _sensitivity, "_blocks_of", lambda layout: made.append(1) or original(layout)
    )
    first = sensitivity(projector, features)
    assert torch.equal(sensitivity(projector, features), first) and len(made) == 1
    sensitivity(Wrapped(projector, E), features)  # a wrapper made anew at each call finds it
    assert len(made) == 1
    _sensitivity.forget(projector)
    assert torch.equal(sensitivity(projector, features), first) and len(made) == 2


def trained(projector: nn.Module) -> None:
    loss = projector(tokens_of(1, 3)).square().sum()
    optimizer = torch.optim.SGD(projector.parameters(), lr=0.01)
    loss.backward()
    optimizer.step()


def written(projector: nn.Module) -> None:
    with torch.no_grad():
        projector.linear_2.weight.mul_(2)


def exchanged(projector: nn.Module) -> None:
    projector.linear_1.weight = nn.Parameter(projector.linear_1.weight.detach() + 1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "training step": trained,
    "in place": written,
    "another parameter": exchanged,
    "load_state_dict": lambda p: p.load_state_dict(Two(E, H, C, nn.GELU(), True).state_dict()),
    "data": lambda p: setattr(p.linear_2.weight, "data", p.linear_2.weight.data * 3),
    "dtype": lambda p: p.bfloat16(),
    "norm": lambda p: nn.init.normal_(p.layer_norm.weight),
    "layer": lambda p: setattr(p, "linear_2", nn.Linear(H, 3)),
    "bias": lambda p: nn.init.normal_(p.linear_1.bias),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_weights_are_noticed(name: str) -> None:
    projector, features = shaken(KNOWN["internvl"]()), tokens_of(1, 6)
    before = sensitivity(projector, features)
    CHANGES[name](projector)
    after = sensitivity(projector, features)
    assert torch.equal(after, fresh(projector, features)) and error(after, before) > 1e-4


def test_another_parameter_in_the_same_memory_is_noticed() -> None:
    """Freed memory is given out again: address and version alone do not tell weights apart."""
    projector, features = shaken(KNOWN["llava"]()), tokens_of(1, 6)
    old = projector.linear_2.weight = nn.Parameter(torch.ones(C, H))
    sensitivity(projector, features)
    old.data.mul_(torch.rand(C, H))
    new = projector.linear_2.weight = nn.Parameter(old.data)
    assert (new.data_ptr(), new._version) == (old.data_ptr(), old._version)
    assert torch.equal(sensitivity(projector, features), fresh(projector, features))


def test_forget_serves_what_cannot_be_noticed() -> None:
    projector, features = shaken(KNOWN["llava"]()), tokens_of(1, 6)
    sensitivity(projector, features)
    projector.linear_2.weight.data *= 2
    _sensitivity.forget(projector)
    assert torch.equal(sensitivity(projector, features), fresh(projector, features))
    _sensitivity.forget(nn.Identity())  # nothing is kept of it, nothing happens


def test_what_is_kept_dies_with_the_projector_and_is_no_part_of_it() -> None:
    projector, features = shaken(KNOWN["llava"]()), tokens_of(1, 6)
    before = pickle.dumps(projector.state_dict()), set(vars(projector))
    sensitivity(projector, features)
    core = find_layout(projector).core
    assert core in _sensitivity._kept and (set(vars(projector))) == before[1]
    other = pickle.loads(pickle.dumps(projector))
    assert other not in _sensitivity._kept and pickle.dumps(projector.state_dict()) == before[0]
    gc.collect()
    count = len(_sensitivity._kept)
    del projector, core
    gc.collect()
    assert len(_sensitivity._kept) == count - 1


def test_weights_made_in_inference_mode_are_measured_each_time() -> None:
    with torch.inference_mode():
        projector = shaken(KNOWN["llava"]())
        features = tokens_of(1, 6)
        before = sensitivity(projector, features)
        projector.linear_2.weight.mul_(2)
        assert error(sensitivity(projector, features), 2 * before) < 1e-6


def test_threads_share_what_is_kept() -> None:
    features = tokens_of(1, 6)
    projectors = [shaken(KNOWN["llava"](), seed) for seed in range(3)]
    expected = [fresh(projector, features) for projector in projectors]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(sensitivity, projectors[i % 3], features) for i in range(48)]
        assert all(torch.equal(job.result(), expected[i % 3]) for i, job in enumerate(jobs))
        moved = [pool.submit(sensitivity, p, features, mode="jvp") for p in projectors * 3]
        assert max(error(job.result(), expected[i % 3]) for i, job in enumerate(moved)) < 0.2
