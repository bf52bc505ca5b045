"""The lifecycle matrix: every listed method on every listed host, by being listed."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch

import vistoken
from hosts import HOSTS, OPTIONS, HostCase
from vistoken.attachment import core_model
from vistoken.contract import Place
from vistoken.errors import AttachError
from vistoken.registry import method_class, method_names, recognise

pytest.importorskip("transformers")

NEW = 5
PICTURES: dict[str, Any] = {}


def _cases(thin: bool = False) -> list[Any]:
    """All pairs of host and method; `thin`: on other hosts than the first a third of them.

    What concerns the machinery alone (pickling, threads, recipes) needs no more; the thirds of the
    hosts differ.
    """
    listed = {row.name: row.hosts for row in vistoken.list_methods("pruning")}
    return [
        pytest.param(host, name, id=f"{host.name}-{name}")
        for number, host in enumerate(HOSTS)
        for place, name in enumerate(method_names("pruning"))
        if host.name in listed[name] and (not thin or number == 0 or (number + place) % 3 == 0)
    ]


every_pair = pytest.mark.parametrize(("host", "name"), _cases())
some_pairs = pytest.mark.parametrize(("host", "name"), _cases(thin=True))


def method(name: str, **budget: Any) -> vistoken.Method:
    return method_class(name).from_options({**OPTIONS.get(name, {}), **budget})


def left(host: HostCase, model: Any, made: Any) -> int:
    """How many tokens of the picture are there behind the last stage, newlines included."""
    picture = PICTURES.setdefault(host.name, host.picture(model))
    newlines = len(picture.separators)
    facts = recognise(core_model(model)).facts
    return made.survivors(picture.tokens, host.keep - newlines, facts) + newlines


def inside(host: HostCase, model: Any, made: Any, *places: Place) -> bool:
    """Whether the method acts at one of the places."""
    stages = made.stages(recognise(core_model(model)).facts)
    return any(stage.place in places for stage in stages)


def generate(model: Any, inputs: dict[str, torch.Tensor], **more: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=NEW, do_sample=False, **more)


def snapshot(model: Any) -> dict[str, Any]:
    """Everything that undo must put back: objects, classes, attributes, hooks, flags, config."""
    state: dict[str, Any] = {"config": model.config.to_dict()}
    for path, module in model.named_modules():
        held = {
            key: dict(value) if isinstance(value, dict) else value
            for key, value in module.__dict__.items()
            if not key.startswith("_parameters") and not key.startswith("_buffers")
        }
        state[path] = (id(module), type(module), module.training, held)
    for key, value in model.named_parameters():
        state["parameter " + key] = (id(value), value.requires_grad)
    return state


@every_pair
def test_detach_restores_everything(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(0)
    dense = model(**inputs).logits
    before = snapshot(model)
    for _ in range(2):
        attachment = vistoken.attach(model, method(name, keep=host.keep))
        changed = model(**inputs).logits
        rest = left(host, model, attachment.methods[0])
        assert changed.shape[1] == dense.shape[1] - host.tokens + rest
        assert attachment.detach() is model
        assert snapshot(model) == before
        assert torch.equal(model(**inputs).logits, dense)
    assert attachment.detach() is model  # a second time does nothing
    assert snapshot(model) == before


@some_pairs
def test_context_manager_survives_an_exception(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(0)
    dense = generate(model, inputs)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), vistoken.attach(model, method(name, keep=host.keep)):
        generate(model, inputs)
        raise KeyboardInterrupt
    assert snapshot(model) == before
    assert torch.equal(generate(model, inputs), dense)


@every_pair
def test_neutral_budget_is_identity(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(0)
    dense, tokens = model(**inputs).logits, generate(model, inputs)
    for budget in ({"ratio": 0.0}, {"keep": host.tokens}, {"keep": 10 * host.tokens}):
        with vistoken.attach(model, method(name, **budget)) as attachment:
            assert torch.equal(model(**inputs).logits, dense)
            assert torch.equal(generate(model, inputs), tokens)
            report = attachment.report()
        assert report.tokens_out == [host.tokens]
        assert report.kept[0].tolist() == list(range(host.tokens))
        assert report.flops == report.flops_dense


@every_pair
def test_kept_counts_are_what_every_layer_sees(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(1)
    long = inputs["input_ids"].shape[1]
    lengths: list[list[int]] = []
    with vistoken.attach(model, method(name, keep=host.keep)) as attachment:
        layers = model.get_decoder().layers
        handles = [
            layer.self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(_hidden(args, kwargs).shape[1]),
                with_kwargs=True,
            )
            for layer in layers
            for seen in [lengths.append([]) or lengths[-1]]
        ]
        sequences = generate(model, inputs)
        for handle in handles:
            handle.remove()
        report = attachment.report()
        rest = left(host, model, attachment.methods[0])
        stops = inside(host, model, attachment.methods[0], Place.LLM_LAYER)
    entered = [seen[0] - (long - host.tokens) for seen in lengths]
    assert entered == report.layer_tokens
    assert all(seen[1:] == [1] * (len(seen) - 1) for seen in lengths)
    assert report.layer_tokens[0] == report.tokens_out[0]
    assert stops or report.tokens_out == [host.keep]
    kept = report.kept[0]
    assert kept.dtype == torch.int64
    assert len(kept) == rest == report.layer_tokens[-1]
    assert bool((kept[1:] > kept[:-1]).all())
    assert int(kept.min()) >= 0 and int(kept.max()) < host.tokens
    assert report.tokens_in == [host.tokens]
    assert torch.equal(sequences[:, :long], inputs["input_ids"])


def _hidden(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs["hidden_states"]


@some_pairs
def test_deepcopy_is_independent(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(0)
    dense = generate(model, inputs)
    vistoken.attach(model, method(name, keep=host.keep))
    pruned = generate(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(generate(twin, inputs), pruned)
    vistoken.detach(twin)
    assert torch.equal(generate(twin, inputs), dense)
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert torch.equal(generate(model, inputs), pruned)
    vistoken.detach(model)
    assert torch.equal(generate(model, inputs), dense)


@some_pairs
def test_pickle_round_trip(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(0)
    vistoken.attach(model, method(name, keep=host.keep))
    again = pickle.loads(pickle.dumps(model))  # before the first call: transformers' own
    assert torch.equal(generate(again, inputs), generate(model, inputs))  # hooks do not pickle
    vistoken.detach(again)
    vistoken.detach(model)
    assert type(again) is type(model)
    assert torch.equal(generate(again, inputs), generate(model, inputs))


@every_pair
def test_left_padded_batch_equals_single_calls(host: HostCase, name: str) -> None:
    model = host.build()
    together, singles = host.many()
    with vistoken.attach(model, method(name, keep=host.keep)) as attachment:
        all_rows = generate(model, together)
        kept = attachment.report().kept
        image = 0
        for row, single in enumerate(singles):
            alone = generate(model, single)
            assert torch.equal(all_rows[row, -NEW:], alone[0, -NEW:]), f"row {row}"
            for own in attachment.report().kept:
                assert torch.equal(own, kept[image])
                image += 1
    assert image == len(kept)


@some_pairs
def test_two_pictures_in_a_row_leave_no_trace(host: HostCase, name: str) -> None:
    model = host.build()
    first, second = host.one(1), host.one(2)
    with vistoken.attach(model, method(name, keep=host.keep)):
        alone = generate(model, second)
    with vistoken.attach(model, method(name, keep=host.keep)):
        generate(model, first)
        assert torch.equal(generate(model, second), alone)


@every_pair
def test_beams_and_samples(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(0)
    long = inputs["input_ids"].shape[1]
    with vistoken.attach(model, method(name, keep=host.keep)) as attachment:
        beams = generate(model, inputs, num_beams=3, num_return_sequences=2)
        assert beams.shape[0] == 2
        assert torch.equal(beams[:, :long], inputs["input_ids"].expand(2, long))
        assert len(attachment.report().kept[0]) == left(host, model, attachment.methods[0])
        torch.manual_seed(0)
        one = model.generate(**inputs, max_new_tokens=NEW, do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW, do_sample=True), one)


@some_pairs
def test_threads_do_not_mix(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = [host.one(seed) for seed in range(4)]
    with vistoken.attach(model, method(name, keep=host.keep)):
        alone = [generate(model, each) for each in inputs]
        found: list[Any] = [None] * len(inputs)

        def work(index: int) -> None:
            for _ in range(2):
                found[index] = generate(model, inputs[index])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for own, other in zip(alone, found, strict=True):
        assert torch.equal(own, other)


@some_pairs
def test_an_exception_in_the_tower_leaves_the_next_call_clean(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(0)
    with vistoken.attach(model, method(name, keep=host.keep)):
        expected = generate(model, inputs)

        def fail(module: Any, args: Any) -> None:
            raise RuntimeError("planned")

        handle = model.get_decoder().layers[-1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="planned"):
            generate(model, inputs)
        handle.remove()
        assert torch.equal(generate(model, inputs), expected)


@every_pair
def test_attention_backends_choose_alike(host: HostCase, name: str) -> None:
    model = host.build()
    inputs = host.one(3)
    with vistoken.attach(model, method(name, keep=host.keep)) as attachment:
        fused = generate(model, inputs)
        kept = attachment.report().kept[0]
        model.set_attn_implementation("eager")
        assert torch.equal(generate(model, inputs), fused)
        assert torch.equal(attachment.report().kept[0], kept)


@some_pairs
def test_recipe_round_trip(host: HostCase, name: str, tmp_path: Any) -> None:
    model = host.build()
    inputs = host.one(0)
    with vistoken.attach(model, method(name, keep=host.keep)) as attachment:
        expected = generate(model, inputs)
        attachment.save(tmp_path / "recipe.json")
    with vistoken.attach(model, tmp_path / "recipe.json") as again:
        assert again.methods == attachment.methods
        assert torch.equal(generate(model, inputs), expected)


@every_pair
def test_gradients_reach_the_kept_tokens(host: HostCase, name: str) -> None:
    """Training works where a method acts between the towers; elsewhere it is refused by name."""
    model = host.build().train()
    inputs = host.one(0)
    labels = inputs["input_ids"].clone()
    made = method(name, keep=host.keep)
    in_llm = inside(host, model, made, Place.LLM_LAYER)
    in_tower = inside(host, model, made, Place.VISION_LAYER, Place.VISION_BLOCK)
    with vistoken.attach(model, made):
        model.gradient_checkpointing_enable()
        if in_llm or in_tower:
            with pytest.raises(AttachError, match="checkpointing"):
                model(**inputs, use_cache=False)
            model.gradient_checkpointing_disable()
        else:
            checkpointed = model(**inputs, labels=labels, use_cache=False).loss
            model.gradient_checkpointing_disable()
            plain = model(**inputs, labels=labels, use_cache=False).loss
            assert torch.allclose(checkpointed, plain)
        if in_llm:
            with pytest.raises(AttachError, match="labels"):
                model(**inputs, labels=labels, use_cache=False)
            loss = model(**inputs, use_cache=False).logits[:, -1].square().sum()
        else:
            loss = model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
    weight = next(iter(recognise(core_model(model)).projector().parameters()))
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


@pytest.mark.parametrize(
    ("host", "name"), [(HOSTS[0], name) for name in ("cls_topk", "fastv", "tome")]
)
def test_compiled_forward_equals_eager(host: HostCase, name: str) -> None:
    """Compiling takes seconds, so of every place a method may act at there is one method."""
    model = host.build()
    inputs = host.one(0)
    with vistoken.attach(model, method(name, keep=host.keep)) as attachment, torch.no_grad():
        eager = model(**inputs).logits
        kept = attachment.report().kept[0]
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(**inputs).logits, eager, atol=1e-5)
        assert torch.equal(attachment.report().kept[0], kept)
    torch._dynamo.reset()
