"""One picture, its first token sooner: prune eagerly, replay the LLM's prefill as a CUDA graph.

    python examples/cuda_graph_prefill.py           # LLaVA-1.5-7B shapes, random weights, one GPU
    python examples/cuda_graph_prefill.py --tiny    # a small model on any machine

A prefill of one short prompt keeps the GPU waiting for its launches: below some 200 tokens it takes
as long as at 200. A pruned prompt always has the same length, so the LLM's part can be captured in
a graph once and replayed. Tower and selection stay eager, because where the pictures lie in the
prompt must be read on the CPU; they are part of the times below. `short_prompt` and
`graphed_prefill` are made to be taken along; they fit methods that prune before the LLM.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import StaticCache

import vistoken
from vistoken.eval import bench_graph, results
from vistoken.eval.bench_checks import distance
from vistoken.eval.bench_models import Inputs, borders, build_model, find_size, make_inputs
from vistoken.eval.bench_rows import ROW_BUDGETS
from vistoken.eval.timing import LapClock, measure_laps, quiet_heap

Prefill = Callable[[Tensor, Tensor], Tensor]


class AtTheLLM(Exception):
    """Ends a call of the model as its LLM begins; `given` are the LLM's arguments."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__("the call ends where the LLM begins")
        self.given = given


@torch.no_grad()
def short_prompt(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run tower and selection of a pruned model: embeddings [B, S, C] and positions [B, S].

    The batch must come out unpadded: one row, or rows of equal length.
    """

    def leave(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        raise AtTheLLM(kwargs)

    handle = model.model.language_model.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        model(**inputs)
    except AtTheLLM as reached:
        embeds, positions = (reached.given[key] for key in ("inputs_embeds", "position_ids"))
    finally:
        handle.remove()
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
    return embeds, positions


@torch.no_grad()
def graphed_prefill(
    model: Any, embeds: Tensor, positions: Tensor, *, room: int = 0
) -> tuple[Prefill, StaticCache]:
    """Capture the LLM's prefill of prompts shaped like `embeds` [B, S, C], once.

    Returns `prefill(embeds, positions)`, which gives the last position's logits [B, V] (they are
    overwritten by the next call), and the KV cache that it fills, with space for `room` more
    tokens. Without CUDA the same operations run eagerly. The model's attention must be sdpa.
    """
    rows, length = embeds.shape[:2]
    size = (
        -(-(length + room) // 16) * 16
    )  # attention kernels take masks of aligned rows as they are
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=size)
    mask = torch.ones(length, size, dtype=torch.bool, device=embeds.device).tril()
    mask = mask.repeat(rows, 1, 1, 1)
    embeds, positions = embeds.clone(), positions.clone()

    def run() -> Tensor:
        cache.reset()
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            hidden = model.model.language_model(
                inputs_embeds=embeds,
                attention_mask=mask,  # every token of a short prompt is there: causal, no padding
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return model.lm_head(hidden[:, -1])

    replay = run
    if embeds.is_cuda:
        # what is made lazily, such as the cache and the libraries' workspaces, is made before
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = run()

        def replay() -> Tensor:
            graph.replay()
            return logits

    @torch.no_grad()
    def prefill(new_embeds: Tensor, new_positions: Tensor) -> Tensor:
        embeds.copy_(new_embeds)
        positions.copy_(new_positions)
        return replay()

    return prefill, cache


Case = tuple[Inputs, Tensor]  # inputs, and the logits [1, V] that they must give


def eager_logits(model: Any, inputs: Inputs, clock: LapClock | None = None) -> Tensor:
    """The last position's logits [1, V] of an ordinary call; its laps are "start" and "llm"."""

    def crossed(border: str) -> None:
        if clock is not None and border == "llm":
            clock.begin(border)

    with borders(model, crossed), torch.no_grad():
        return model(**inputs, logits_to_keep=1).logits[:, -1]


def agrees(model: Any) -> Callable[[Case, Tensor], str | None]:
    """The check of a timed call: its logits are those of its case, within the dtype's budget."""
    budget = ROW_BUDGETS[model.dtype]

    def check(case: Case, logits: Tensor) -> str | None:
        off = distance(logits, case[1])
        return None if off <= budget else f"logits differ by {off:.2e}, budget {budget:.0e}"

    return check


def time_call(
    label: str,
    model: Any,
    call: Callable[[Inputs, LapClock], Tensor],
    cases: list[Case],
    repeats: int,
) -> dict[str, Any]:
    """Check and time one way to the first token, as a row of the result file."""
    laps = measure_laps(
        lambda case, clock: call(case[0], clock),
        cases,
        device=model.device,
        check=agrees(model),
        repeats=repeats,
    )
    ms = {"llm": laps.timing("llm"), "first_token": laps.timing()}
    return {"label": label, "ms": {name: asdict(timing) for name, timing in ms.items()}}


def compare(size: str, keep: int, device: torch.device, repeats: int) -> results.ResultFile:
    """Time the dense and the pruned prefill, eager, and the pruned one as a graph."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_model(size, device=device, dtype=dtype)
    inputs = [make_inputs(model, 1, seed=seed) for seed in range(2)]

    def eager(given: Inputs, clock: LapClock) -> Tensor:
        return eager_logits(model, given, clock)

    cases = [(given, eager_logits(model, given)) for given in inputs]
    rows = [time_call("dense, eager", model, eager, cases, repeats)]
    with vistoken.prune_visual_tokens(model, keep=keep, method="spread"):
        cases = [(given, eager_logits(model, given)) for given in inputs]
        rows.append(time_call(f"{keep} tokens, eager", model, eager, cases, repeats))
        prefill, _ = graphed_prefill(model, *short_prompt(model, inputs[0]), room=32)

        def graphed(given: Inputs, clock: LapClock) -> Tensor:
            embeds, positions = short_prompt(model, given)
            clock.begin("llm")
            return prefill(embeds, positions)

        label = f"{keep} tokens, {'CUDA graph' if device.type == 'cuda' else 'static cache'}"
        rows.append(time_call(label, model, graphed, cases, repeats))
        off = max(distance(prefill(*short_prompt(model, given)), own) for given, own in cases)
    checks = {
        "logits": off,
        "budget": ROW_BUDGETS[dtype],
        "control": distance(cases[0][1], cases[1][1]),
    }
    settings = {
        "model": size,
        "title": find_size(size).title,
        "dtype": str(dtype).removeprefix("torch."),
        "method": "spread",
        "keep": keep,
        "repeats": repeats,
    }
    return results.ResultFile(bench_graph.NAME, results.machine(device), settings, rows, checks)


def main(words: list[str] | None = None) -> None:
    """Read the command line, measure, print, and write the result file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine")
    parser.add_argument("--keep", type=int, help="visual tokens that stay; 64, or 12 with --tiny")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls")
    parser.add_argument(
        "--out", type=Path, help="result file, such as eval/results/bench_graph.json"
    )
    given = parser.parse_args(words)
    if not given.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny runs a small model on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, keep = ("tiny", 12) if given.tiny else ("llava-1.5-7b", 64)
    with quiet_heap():
        result = compare(size, given.keep or keep, device, given.repeats)
    Console(width=120).print(bench_graph.grid(result).to_rich())
    print(bench_graph.summary(result))
    if given.out is not None:
        print("written to", result.write(given.out))


if __name__ == "__main__":
    main()
