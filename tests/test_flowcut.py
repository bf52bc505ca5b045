"""FlowCut against a slow transcription of its rule, over synthetic queries, keys and values."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from device_reads import Reads
from flowcut_tower import (
    Layer,
    flat,
    flow,
    only,
    read,
    run,
    spread,
    synthetic,
    transcription,
)
from vistoken.contract import Signal
from vistoken.errors import MethodError
from vistoken.pruning.flowcut import (
    FlowCut,
    drop_count,
    entropy_ratio,
    flow_score,
    value_norm,
    value_similarity,
)

# --- the official rule ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["released", "paper"])
@pytest.mark.parametrize("prefix", [1, 0, 3])
def test_the_measured_schedule_follows_the_transcription(mode: str, prefix: int) -> None:
    choose, early, partial = random.Random(prefix), 0, 0
    for seed in range(25):
        images, tokens = choose.randint(1, 3), choose.choice([7, 20, 41])
        depth, peak = choose.choice([1, 5, 8, 13, 14]), choose.choice([0.1, 1.0, 3.0])
        keep = choose.choice([1, 2, tokens // 3, tokens - 1])
        layers = synthetic(images, tokens, depth, seed=seed, prefix=prefix, peak=peak)
        method = FlowCut(keep=keep, mode=mode, batch_invariant=False)
        found, lengths = run(method, layers, keep, prefix=prefix)
        expected, expected_lengths = transcription(layers, keep, prefix=prefix, mode=mode)
        assert (found.tolist(), lengths) == (expected, expected_lengths)
        early += len(set(lengths)) > 1
        partial += len(set(lengths)) > 3
    assert early >= 12 and partial >= 3  # the stages before the last one did something


def test_the_fixed_schedule_ranks_by_the_same_rule() -> None:
    for seed, ratio in enumerate([None, 0.0, 0.5, 0.93, 1.0]):
        depth, keep = 12, 5
        layers = synthetic(2, 37, depth, seed=seed)
        typical = {i: 0.97 if i < 6 else 0.9 if i < 8 else 0.8 for i in range(depth)}
        assumed = typical if ratio is None else dict.fromkeys(range(depth), ratio)
        found, lengths = run(FlowCut(keep=keep, entropy=ratio), layers, keep)
        expected, expected_lengths = transcription(layers, keep, assumed=assumed)
        assert (found.tolist(), lengths) == (expected, expected_lengths)


def test_history_and_every_layer_of_it_matter() -> None:
    """Swapping two layers that do not prune changes picks: a rule of one layer would not see it."""
    changed = 0
    for seed in range(6):
        layers = synthetic(1, 30, 9, seed=seed)
        for i in (1, 7):
            other = list(layers)
            other[i] = synthetic(1, 30, 1, seed=100 + seed)[0]
            method = FlowCut(keep=8)
            changed += not torch.equal(run(method, layers, 8)[0], run(method, other, 8)[0])
    assert changed >= 6


def test_paper_and_released_differ() -> None:
    layers = synthetic(1, 40, 6)
    one, other = (run(FlowCut(keep=9, mode=m), layers, 9)[0] for m in ("paper", "released"))
    assert not torch.equal(one, other)


def test_half_precision_signals_are_read_in_fp32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        layers = synthetic(2, 40, 8, dtype=dtype)
        wide = [Layer(x.queries.float(), x.keys.float(), x.values.float()) for x in layers]
        for mode, prefix in (("released", 1), ("paper", 1), ("released", 0)):
            method = FlowCut(keep=9, mode=mode)
            expected = run(method, wide, 9, prefix=prefix)
            with torch.autocast("cpu", torch.bfloat16):
                flow = value_similarity(layers[0].values[:, :, 0], layers[0].values, 1.0, mode)
                norm = value_norm(layers[0].values)
            exact = value_similarity(wide[0].values[:, :, 0], wide[0].values, 1.0, mode)
            assert torch.equal(flow, exact) and flow.dtype == torch.float32
            assert torch.allclose(norm, value_norm(wide[0].values), rtol=1e-6)
            assert torch.equal(run(method, layers, 9, prefix=prefix)[0], expected[0])


# --- the schedule --------------------------------------------------------------------------------


def test_typical_lengths_of_a_clip_tower() -> None:
    """24 layers, feature layer 22, 576 tokens: worked out for entropy ratios 0.97, 0.9, 0.8."""
    lengths = run(FlowCut(keep=64), synthetic(1, 576, 22), 64)[1]
    assert lengths[1::2] == [569, 562, 555, 547, 539, 510, 480, 419, 355, 281, 64]
    assert lengths[0] == 576 and lengths[2::2] == lengths[1:-1:2]  # odd layers alone prune


@pytest.mark.parametrize("depth", [1, 2, 3, 22, 25, 26])
@pytest.mark.parametrize("invariant", [True, False])
def test_layers_that_prune_are_an_even_number_before_the_last(depth: int, invariant: bool) -> None:
    layers = synthetic(1, 60, depth, peak=4.0)
    for keep in (1, 11, 59):
        method = FlowCut(keep=keep, batch_invariant=invariant)
        _, lengths = run(method, layers, keep)
        drops = [i for i, (a, b) in enumerate(zip([60, *lengths], lengths, strict=False)) if a > b]
        assert all((depth - 1 - i) % 2 == 0 for i in drops)
        assert lengths == sorted(lengths, reverse=True) and lengths[-1] == keep


def test_equal_attention_leaves_the_cut_to_the_last_stage() -> None:
    for batch_invariant, entropy in ((False, None), (True, 1.0)):
        method = FlowCut(keep=10, batch_invariant=batch_invariant, entropy=entropy)
        assert run(method, flat(50, 8, False), 10)[1] == [50] * 7 + [10]


def test_attention_on_one_token_cuts_the_most() -> None:
    expected, count = [], 50
    for layer in range(8):
        remaining = 7 - layer
        if remaining % 2 == 0:
            count -= round((count - 10) / math.sqrt(remaining)) if remaining else count - 10
        expected.append(count)
    for batch_invariant, entropy in ((False, None), (True, 0.0)):
        method = FlowCut(keep=10, batch_invariant=batch_invariant, entropy=entropy)
        assert run(method, flat(50, 8, True), 10)[1] == expected


def test_drop_count_stays_within_the_budget() -> None:
    choose = random.Random(0)
    for _ in range(2000):
        tokens = choose.randint(2, 3000)
        keep, remaining = choose.randint(1, tokens), choose.randint(1, 40)
        ratio = choose.choice([0.0, 1.0, 1.0 + 1e-6, choose.random()])
        found = drop_count(tokens, keep, remaining, ratio)
        exact = (tokens - keep) / math.sqrt(remaining) * (1 - ratio**2)
        assert 0 <= found <= tokens - keep and abs(found - exact) <= 0.5 + 1e-2


def test_entropy_ratio() -> None:
    assert entropy_ratio(torch.full((3, 576), 1e-3)).sub(1).abs().max() < 1e-6
    row = torch.zeros(2, 9)
    row[0, 4] = 0.7  # the other row is all zero, the first one has zeros
    assert entropy_ratio(row).tolist() == [0.0, 0.0]
    for seed in range(5):
        values = torch.rand(17, generator=torch.Generator().manual_seed(seed))
        assert abs(entropy_ratio(values).item() - spread(values.tolist())) < 1e-5
    assert entropy_ratio(torch.rand(4, 1)).isfinite().all()


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [1, 0])
@pytest.mark.parametrize("mode", ["released", "paper"])
def test_fixed_schedule_keeps_the_same_in_any_batch(prefix: int, mode: str) -> None:
    layers = synthetic(3, 40, 9, prefix=prefix)
    for layer in layers:
        layer.queries[1] *= 20  # one peaked picture among spread ones
    method = FlowCut(keep=7, mode=mode)
    together, lengths = run(method, layers, 7, prefix=prefix)
    for i in range(3):
        alone, own = run(method, only(layers, i), 7, prefix=prefix)
        assert torch.equal(alone[0], together[i]) and own == lengths
    turned, _ = run(method, only(layers, 2, 0, 0, 1), 7, prefix=prefix)
    assert torch.equal(turned, together[[2, 0, 0, 1]])


def test_measured_schedule_depends_on_the_batch_but_not_its_end() -> None:
    layers = synthetic(2, 40, 9, peak=0.3)
    for layer in layers:
        layer.queries[1] *= 60
    method = FlowCut(keep=7, batch_invariant=False)
    together, lengths = run(method, layers, 7)
    calm, own = run(method, only(layers, 0), 7)
    assert own != lengths and own[-1] == lengths[-1] == 7 and together.shape == (2, 7)
    assert torch.equal(run(method, only(layers, 0, 0), 7)[0], calm.repeat(2, 1))


@pytest.mark.parametrize("invariant", [True, False])
def test_only_the_measured_schedule_waits_for_the_device(invariant: bool) -> None:
    layers, method = synthetic(2, 40, 9), FlowCut(keep=7, batch_invariant=invariant)
    for visible in (None, torch.rand(2, 40) > 0.4):
        reads = Reads()
        run(method, layers, 7, visible=visible, reads=reads)
        assert reads.count == (0 if invariant else 4)  # layers 0, 2, 4, 6; layer 8 needs none


def test_a_broken_picture_spoils_no_other() -> None:
    good = synthetic(1, 30, 8, seed=3)
    for bad in (math.nan, math.inf):
        broken = synthetic(1, 30, 8, seed=4)
        for layer in broken:
            layer.values[0, 1, 5] = bad
            layer.queries[0, 0, 0, 0] = bad
        both = [
            Layer(*(torch.cat([getattr(x, n), getattr(y, n)]) for n in vars(x)))
            for x, y in zip(broken, good, strict=True)
        ]
        found, _ = run(FlowCut(keep=6), both, 6)
        assert torch.equal(found[1:], run(FlowCut(keep=6), good, 6)[0])
        assert found[0].min() >= 0 and found[0].max() < 30
        measured, lengths = run(FlowCut(keep=6, batch_invariant=False), both, 6)
        assert lengths[-1] == 6 and measured[0].min() >= 0 and measured[0].max() < 30


def test_zero_attention_ends_in_finite_flow() -> None:
    """Half precision makes small attention exactly zero: its logarithm must not count."""
    layers = flat(30, 6, True)
    assert read(layers[0], torch.arange(30)[None], 1, Signal.CLS_ATTENTION).count_nonzero() == 1
    for invariant in (True, False):
        found, lengths = run(FlowCut(keep=4, batch_invariant=invariant), layers, 4)
        assert lengths[-1] == 4 and 3 in found[0]  # token 3, behind the CLS token, has it all
    zero = flow_score(torch.zeros(2, 5), torch.rand(2, 5), torch.rand(2, 5))
    assert zero.isfinite().all() and (zero > 0).any()


# --- flow ----------------------------------------------------------------------------------------


def test_flow_score_is_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 17):
        a, u, w = torch.rand(3, 4, tokens, generator=draw)
        found = flow_score(a, u, w)
        assert found.shape == (4, tokens) and found.dtype == torch.float32
        for i in range(4):
            rows = a[i].tolist(), u[i].tolist(), w[i].tolist()
            assert np.allclose(found[i].tolist(), flow(*rows), rtol=1e-5)
            assert torch.equal(flow_score(a[i], u[i], w[i]), found[i])
            assert np.allclose(flow_score(a[i], None, w[i]).tolist(), flow(rows[0], None, rows[2]))
    by_hand = flow_score(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), torch.tensor([1, 10]))
    assert by_hand.tolist() == [0.75, 12.5]
    half = flow_score(a.half(), u.bfloat16(), w.half())
    assert half.dtype == torch.float32 and torch.allclose(half, found, rtol=2e-2)


def test_flow_score_refuses_shapes_that_differ() -> None:
    five, six = torch.rand(5), torch.rand(6)
    for given in (
        (five, six, five),
        (five, five, six),
        (five, None, six),
        (five[None], five, five),
    ):
        with pytest.raises(MethodError, match=r"one shape \[\.\.\., N\], got \[.*5\]"):
            flow_score(*given)
    with pytest.raises(MethodError, match="one shape"):
        flow_score(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0))


def test_scaling_the_values_scales_the_norm_and_changes_the_likeness() -> None:
    layers = synthetic(1, 40, 1)
    values = layers[0].values
    norm, alike = value_norm(values), value_similarity(values[:, :, 0], values, 1.0, "released")
    larger = value_similarity(3 * values[:, :, 0], 3 * values, 1.0, "released")
    assert torch.allclose(value_norm(3 * values), 3 * norm)
    assert (larger - alike).abs().max() > 0.05 and torch.allclose(larger.sum(-1), torch.ones(1))
    cosine = value_similarity(values[:, :, 0], values, 1.0, "paper")
    scaled = value_similarity(3 * values[:, :, 0], 3 * values, 1.0, "paper")
    assert torch.allclose(cosine, scaled, atol=1e-6)
    assert cosine[0, 0].sub(1).abs() < 1e-6 and (cosine >= 0).all() and (cosine == 0).any()
    picks = run(FlowCut(keep=9), layers, 9)[0]
    more = run(FlowCut(keep=9), [replace(layers[0], values=3 * values)], 9)[0]
    expected = transcription([replace(layers[0], values=3 * values)], 9)[0]
    assert more.tolist() == expected and not torch.equal(more, picks)


def test_norm_takes_the_mean_of_heads_first() -> None:
    values = torch.tensor([1.0, -1.0])[None, :, None, None].expand(1, 2, 3, 4)
    assert value_norm(values).tolist() == [[0.0, 0.0, 0.0]]  # heads cancel; |v| would be 4
