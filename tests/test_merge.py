"""Token merging against loops over Python floats: matching, means, padding, and the way back."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vistoken.errors import MethodError
from vistoken.kernels.merge import MergePlan, match, merge, released_order, unmerge

# --- the oracle ----------------------------------------------------------------------------------


def cosine(a: list[float], b: list[float]) -> float:
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0


def slow_links(
    metric: list[list[float]], r: int, protected: int, sequence: list[int] | None = None
) -> dict[int, int]:
    """Which token merges into which, counted without the protected ones; in order of strength."""
    tokens = metric[protected:]
    sequence = list(range(len(tokens))) if sequence is None else sequence
    set_a = [t for place, t in enumerate(sequence) if (place + protected) % 2 == 0]
    set_b = [t for place, t in enumerate(sequence) if (place + protected) % 2 == 1]
    edges = []
    for a in set_a:
        best, chosen = -2.0, -1
        for b in set_b:
            similar = cosine(tokens[a], tokens[b])
            if similar > best:
                best, chosen = similar, b
        if set_b:
            edges.append((best, a, chosen))
    edges.sort(key=lambda edge: -edge[0])  # stable: ties stay in sequence
    return {a: b for _, a, b in edges[:r]}


def slow_merge(
    rows: list[list[float]], sizes: list[float], links: dict[int, int]
) -> tuple[list[list[float]], list[float]]:
    """Size-weighted means in the raster order of the tokens that stay."""
    means, totals = [], []
    for token, row in enumerate(rows):
        if token in links:
            continue
        group = [token] + [a for a, b in links.items() if b == token]
        total = sum(sizes[i] for i in group)
        means.append([sum(sizes[i] * rows[i][c] for i in group) / total for c in range(len(row))])
        totals.append(total)
    return means, totals


def links_of(plan: MergePlan, row: int) -> dict[int, int]:
    return dict(zip(plan.source[row].tolist(), plan.target[row].tolist(), strict=True))


def check_plan(plan: MergePlan, tokens: int, r: int) -> None:
    """Every token stays or leaves, ascending and once; targets stay."""
    assert plan.merged == r and plan.tokens == tokens
    for kept, source, target in zip(
        plan.kept.tolist(), plan.source.tolist(), plan.target.tolist(), strict=True
    ):
        assert kept == sorted(kept) and sorted(kept + source) == list(range(tokens))
        assert set(target) <= set(kept) | {-1}


SHAPES = [(1, 1, 0), (2, 1, 1), (3, 1, 1), (4, 2, 0), (7, 3, 0), (7, 3, 1), (8, 4, 5), (9, 4, 2)]
SHAPES += [(16, 5, 1), (25, 12, 1), (25, 1, 4), (36, 18, 5), (37, 9, 0)]


@pytest.mark.parametrize(("tokens", "r", "protected"), SHAPES)
@pytest.mark.parametrize("kind", ["random", "ties", "some zero"])
def test_match_and_merge_equal_loops(tokens: int, r: int, protected: int, kind: str) -> None:
    metric = torch.randn(3, protected + tokens, 5)
    if kind == "ties":  # one-hot rows: cosines are exactly 0 or 1
        metric = torch.eye(5)[torch.randint(5, (3, protected + tokens))]
    elif kind == "some zero":
        metric[:, ::3] = 0
    plan = match(metric, r, protected=protected)
    check_plan(plan, tokens, min(r, tokens // 2))
    x, sizes = torch.randn(3, protected + tokens, 4), torch.randint(1, 9, (3, protected + tokens))
    sizes = sizes.float()
    merged, new_sizes = merge(x, sizes, plan)
    for row in range(3):
        links = slow_links(metric[row].double().tolist(), min(r, tokens // 2), protected)
        assert list(links_of(plan, row).items()) == list(links.items())
        means, totals = slow_merge(
            x[row, protected:].double().tolist(), sizes[row, protected:].tolist(), links
        )
        torch.testing.assert_close(merged[row, protected:], torch.tensor(means))
        assert new_sizes[row, protected:].tolist() == totals
    assert torch.equal(merged[:, :protected], x[:, :protected])
    assert torch.equal(new_sizes[:, :protected], sizes[:, :protected])


def test_alternation_counts_the_prefix() -> None:
    """Behind one CLS token raster index 0 is position 1: B; without a prefix it is in A."""
    metric = torch.randn(40, 9, 4)
    for protected in range(4):
        plan = match(metric, 9, protected=protected)
        assert set((plan.source + protected).flatten().remainder(2).tolist()) == {0}
        assert set((plan.target + protected).flatten().remainder(2).tolist()) == {1}


def test_protected_tokens_never_match_even_when_identical() -> None:
    metric = torch.randn(2, 14, 6)
    metric[:, :5] = metric[:, 5:6]  # registers like the first token
    plan = match(metric, 4, protected=5)
    check_plan(plan, 9, 4)
    x = torch.randn(2, 14, 3)
    assert torch.equal(merge(x, torch.ones(2, 14), plan)[0][:, :5], x[:, :5])


def test_r_is_cut_to_half_of_the_unprotected() -> None:
    for tokens in (1, 2, 5, 8):
        for protected in (0, 1, 5):
            plan = match(torch.randn(2, protected + tokens, 3), 99, protected=protected)
            check_plan(plan, tokens, tokens // 2)


def test_sizes_sum_to_n_after_every_layer() -> None:
    for tokens, protected in ((576, 1), (37, 0), (63, 5)):
        x, sizes = torch.randn(2, protected + tokens, 8), torch.ones(2, protected + tokens)
        while x.shape[1] > protected + 2:
            plan = match(x, max(1, (x.shape[1] - protected) // 3), protected=protected)
            x, sizes = merge(x, sizes, plan)
            assert sizes[:, protected:].sum(1).tolist() == [tokens, tokens]
            assert (sizes[:, :protected] == 1).all() and (sizes >= 1).all()


def test_the_mean_of_all_is_kept() -> None:
    """Size-weighted means keep the sum over original tokens, whatever merged."""
    x, sizes = torch.randn(2, 49, 8, dtype=torch.float64), torch.ones(2, 49)
    before = x.sum(1)
    for _ in range(4):
        x, sizes = merge(x, sizes, match(x, 9))
    torch.testing.assert_close((x * sizes[..., None]).sum(1), before)


def test_no_merge_is_the_identity() -> None:
    x, sizes = torch.randn(2, 8, 3), torch.rand(2, 8)
    plan = match(x, 0, protected=1)
    check_plan(plan, 7, 0)
    merged, same = merge(x, sizes, plan)
    assert merged is x and same is sizes and unmerge(x, plan) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_without_partner_keep_every_bit(dtype: torch.dtype) -> None:
    x = torch.randn(2, 31, 16).to(dtype)
    sizes = torch.randint(1, 50, (2, 31)).float()
    plan = match(torch.randn(2, 31, 4), 6)
    merged, _ = merge(x, sizes, plan)
    assert merged.dtype == dtype
    for row in range(2):
        for place, token in enumerate(plan.kept[row].tolist()):
            if token not in plan.target[row].tolist():
                assert torch.equal(merged[row, place], x[row, token])


def test_half_precision_means_are_rounded_once() -> None:
    x, sizes = torch.randn(3, 40, 16).bfloat16(), torch.randint(1, 300, (3, 40)).float()
    plan = match(torch.randn(3, 40, 4), 20)
    exact = merge(x.double(), sizes, plan)[0]
    torch.testing.assert_close(merge(x, sizes, plan)[0].double(), exact, rtol=2**-8, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match(x, 20).source, match(x.float(), 20).source)
        inside = merge(x.float(), sizes, plan)[0]
    assert torch.equal(inside, merge(x.float(), sizes, plan)[0])


def test_gradients_reach_all_tokens_that_were_merged() -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.randint(1, 5, (2, 9)).double().requires_grad_()
    plan = match(x, 3, protected=1)
    torch.autograd.gradcheck(lambda a, b: merge(a, b, plan)[0], (x, sizes))
    torch.autograd.gradcheck(lambda a: unmerge(merge(a, sizes.detach(), plan)[0], plan), (x,))
    merge(x, sizes, plan)[0].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_unmerge_gives_every_token_its_representative() -> None:
    x = torch.randn(2, 5 + 30, 4)
    plans, sizes, merged = [], torch.ones(2, 35), x
    for r in (7, 11, 4):
        plans.append(match(merged, r, protected=5))
        merged, sizes = merge(merged, sizes, plans[-1])
    back = merged
    for plan in reversed(plans):
        back = unmerge(back, plan)
    assert back.shape == x.shape
    for row in range(2):
        assert torch.equal(back[row, :5], x[row, :5])
        for token in range(30):
            place = token
            for plan in plans:
                place = links_of(plan, row).get(place, place)
                place = plan.kept[row].tolist().index(place)
            assert torch.equal(back[row, 5 + token], merged[row, 5 + place])


def test_rows_do_not_depend_on_their_batch() -> None:
    metric = torch.randn(5, 50, 8)
    visible = torch.rand(5, 49) > 0.3
    for given in (None, visible):
        plan = match(metric, 13, protected=1, visible=given)
        for row in range(5):
            mask = None if given is None else given[row : row + 1]
            alone = match(metric[row : row + 1], 13, protected=1, visible=mask)
            assert torch.equal(alone.source[0], plan.source[row])
            assert torch.equal(alone.target[0], plan.target[row])


# --- the official sequence -----------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "protected"), [(24, 1), (25, 1), (23, 0), (24, 5), (9, 2)])
def test_released_order_equals_lists_that_are_really_reordered(tokens: int, protected: int) -> None:
    """Follow four merges on lists whose tokens lie as the official code leaves them."""
    names = list(range(protected + tokens))  # the protected ones first
    metric = {name: torch.randn(5).double().tolist() for name in names}
    lying = names[protected:]
    order, raster = None, list(lying)
    for r in (3, 2, 4, 1):
        rows = torch.tensor([[metric[name] for name in names[:protected] + raster]])
        plan = match(rows, r, protected=protected, order=order)
        found = {raster[a]: raster[b] for a, b in links_of(plan, 0).items()}
        links = slow_links([metric[name] for name in names[:protected] + lying], r, protected)
        assert found == {lying[a]: lying[b] for a, b in links.items()}
        order = released_order(plan, order)
        set_a = [t for i, t in enumerate(lying) if (i + protected) % 2 == 0 and i not in links]
        lying = set_a + [t for i, t in enumerate(lying) if (i + protected) % 2 == 1]
        raster = [raster[i] for i in plan.kept[0].tolist()]
        assert raster == sorted(raster) and [raster[i] for i in order[0].tolist()] == lying


# --- padding -------------------------------------------------------------------------------------


def slow_visible_links(
    metric: list[list[float]], r: int, protected: int, visible: list[bool], release: bool
) -> dict[int, int]:
    """The rule for padding in words: it leaves first, into its first token, which leaves last."""
    tokens = metric[protected:]
    r = min(r, len(tokens) // 2)
    padding = [i for i, seen in enumerate(visible) if not seen]
    seen = [i for i, one in enumerate(visible) if one]
    sink = padding[:1]
    leaving = sorted(padding[1:], key=lambda i: -cosine(tokens[i], tokens[sink[0]]))
    if release:
        leaving += sink
    leaving = leaving[:r]
    alone = [tokens[i] for i in seen]
    edges = slow_links([[0.0]] * (protected % 2) + alone, len(alone), protected % 2)
    links = {i: sink[0] for i in leaving}
    for a, b in edges.items():
        if len(links) < r:
            links[seen[a]] = seen[b]
    if len(links) < r:  # no visible token is left to merge
        links[sink[0]] = -1
    if sink and sink[0] in links:
        links.update({i: -1 for i in links if i in padding})
    return links


@pytest.mark.parametrize("protected", [0, 1, 5])
def test_padding_equals_the_rule_in_loops(protected: int) -> None:
    choose = random.Random(protected)
    dropped = 0
    for _ in range(80):
        tokens = choose.choice([1, 2, 3, 4, 7, 12, 25])
        r, release = choose.randint(0, tokens // 2), choose.random() < 0.5
        share = choose.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        visible = torch.rand(2, tokens) < share
        if share == 1.0:
            visible = torch.ones_like(visible)
        metric = torch.randn(2, protected + tokens, 4)
        plan = match(metric, r, protected=protected, visible=visible, release=release)
        check_plan(plan, tokens, r)
        for row in range(2):
            expected = slow_visible_links(
                metric[row].double().tolist(), r, protected, visible[row].tolist(), release
            )
            assert links_of(plan, row) == expected
            dropped += -1 in expected.values()
    assert dropped >= 4


def test_a_mask_that_shows_all_changes_nothing() -> None:
    for protected in (0, 1, 4):
        metric = torch.randn(3, protected + 21, 6)
        plain = match(metric, 8, protected=protected)
        shown = match(metric, 8, protected=protected, visible=torch.ones(3, 21, dtype=torch.bool))
        assert torch.equal(plain.source, shown.source) and torch.equal(plain.target, shown.target)


def test_padding_never_mixes_with_what_is_visible() -> None:
    """Tokens that start as unit vectors show in the end what each one is made of."""
    visible = torch.rand(4, 36) > 0.4
    origin = torch.arange(36).expand(4, 36)
    x, sizes, left = torch.eye(36).expand(4, 36, 36), torch.ones(4, 36), 36
    keys = torch.randn(36, 5)
    for r, last in ((10, False), (9, False), (8, True)):
        mask = visible.gather(1, origin)
        plan = match(keys[origin], r, visible=mask, release=last)
        x, sizes = merge(x, sizes, plan)
        origin, left = origin.gather(1, plan.kept), left - r
        seen = visible.gather(1, origin)
        inside = (x * visible[:, None].float()).sum(-1)  # the visible share of every token
        torch.testing.assert_close(inside, seen.float())
    assert seen.sum(1).tolist() == visible.sum(1).clamp(max=left).tolist()


def test_dropped_padding_comes_back_as_zeros() -> None:
    visible = torch.ones(1, 6, dtype=torch.bool)
    visible[0, 4:] = False
    x = torch.randn(1, 6, 3)
    plan = match(x, 3, visible=visible, release=True)
    assert links_of(plan, 0)[4] == links_of(plan, 0)[5] == -1
    merged, sizes = merge(x, torch.ones(1, 6), plan)
    assert sizes.sum() == 4
    back = unmerge(merged, plan)
    assert (back[0, 4:] == 0).all() and (back[0, :4] != 0).all()


def test_nan_does_not_change_counts() -> None:
    metric = torch.randn(2, 20, 4)
    metric[0, 3], metric[1] = torch.nan, torch.inf
    visible = torch.rand(2, 20) > 0.3
    for mask in (None, visible):
        check_plan(match(metric, 7, visible=mask), 20, 7)


# --- the rest ------------------------------------------------------------------------------------


def test_no_value_is_read_back() -> None:
    """Fake tensors have no values: anything that needs one raises."""
    with FakeTensorMode():
        x, visible = torch.randn(2, 21, 4), torch.rand(2, 20) > 0.5
        for mask in (None, visible):
            plan = match(x, 6, protected=1, visible=mask, release=True)
            merged, sizes = merge(x, torch.ones(2, 21), plan)
            assert merged.shape == (2, 15, 4) and sizes.shape == (2, 15)
            assert unmerge(merged, plan).shape == x.shape
            assert released_order(plan).shape == (2, 14)


def test_bad_arguments_are_refused() -> None:
    x = torch.randn(2, 8, 3)
    for given, words in (
        ({"r": -1}, "not be negative"),
        ({"r": 1, "protected": 9}, "at most 8"),
        ({"r": 1, "visible": torch.ones(2, 7, dtype=torch.bool)}, r"visible must be \[2, 8\]"),
        ({"r": 1, "order": torch.zeros(2, 9, dtype=torch.long)}, r"order must be \[2, 8\]"),
    ):
        with pytest.raises(MethodError, match=words):
            match(x, **given)
    plan = match(x, 2)
    with pytest.raises(MethodError, match=r"for \[2, 8\].* got \[2, 6\]"):
        merge(torch.randn(2, 6, 3), torch.ones(2, 6), plan)
    with pytest.raises(MethodError, match=r"for \[2, 6\].* got \[2, 8\]"):
        unmerge(x, plan)


def test_a_plan_serves_tokens_without_their_prefix() -> None:
    x = torch.randn(2, 12, 3)
    plan = match(x, 4, protected=2)
    whole, sizes = merge(x, torch.ones(2, 12), plan)
    tail, tail_sizes = merge(x[:, 2:], torch.ones(2, 10), replace(plan, protected=0))
    assert torch.equal(tail, whole[:, 2:]) and torch.equal(tail_sizes, sizes[:, 2:])
