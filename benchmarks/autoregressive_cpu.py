"""Ordinary autoregressive work on a CPU: the engine with ``structure="off"`` against transformers.

A random Qwen2 of 0.24 B parameters in bfloat16 writes 64 tokens to each of B prompts of 256, greedily. Sides, in
turns, in one process, on the same weights:

- engine: ``MultiverseEngine`` with ``structure="off"``.
- generate: ``generate`` of the plain model on the whole batch.
- continuous: ``generate_batch`` of the plain model, transformers' continuous batching.

All sides write the same number of tokens; the time includes the prompts' own passes. Ratios are of the medians.

What guidance and bookkeeping cost is a small part of a step, and machines vary by more. So two engines, one with
``structure="off"`` and one with ``structure="guided"``, write the same text step by step in turns: a step of one is
compared with the step of the other that came next to it, and the median of these differences is what is given.

    python benchmarks/autoregressive_cpu.py
    python benchmarks/autoregressive_cpu.py --repeats 5 --output benchmarks/results/autoregressive_cpu.json
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from decode_cpu import VOCAB, make_models
from report import (
    announce,
    count,
    environment,
    finish,
    make_parser,
    seconds_of_passes,
    show,
    show_environment,
    shown,
    spread,
    store,
)
from transformers import AutoModelForCausalLM, GenerationConfig
from workload import EOS, make_prompts, make_tags, silence_tags, small_cache, steps_in_turns

from multiverse_hf import MultiverseEngine
from multiverse_hf.modeling.cache import LogCache
from multiverse_hf.modeling.cpu import can_pack
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.generation import read_requests
from multiverse_hf.modeling.threads import set_threads

SIDES = ("engine", "generate", "continuous")


def measure(batch: int, args: argparse.Namespace, models: tuple[Any, Any, Any]) -> dict[str, Any]:
    """Time all sides on one batch size."""
    parallel, plain, paged = models
    prompts = make_prompts(batch, args.prompt, VOCAB)
    greedy = {"max_new_tokens": args.tokens, "do_sample": False}
    config = GenerationConfig(**greedy, eos_token_id=-1, pad_token_id=EOS)
    capacity = batch * (args.prompt + args.tokens + 64)

    def generate() -> int:
        output = plain.generate(prompts, attention_mask=torch.ones_like(prompts), eos_token_id=None, **greedy)
        return output[:, args.prompt :].numel()

    def continuous() -> int:
        outputs = paged.generate_batch(
            prompts.tolist(), generation_config=config, continuous_batching_config=small_cache()
        )
        return sum(len(output.generated_tokens) for output in outputs.values())

    with MultiverseEngine(parallel, max_cache_tokens=capacity) as front:

        def engine() -> int:
            results = front.generate(list(prompts), structure="off", eos_token_id=None, **greedy)
            return sum(len(result.ids) for result in results)

        sides: dict[str, Callable[[], int]] = {
            "engine": engine,
            "generate": generate,
            "continuous": continuous,
        }
        sides = {side: call for side, call in sides.items() if side not in args.skip}
        for call in sides.values():
            call()
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        order = list(sides)
        for _ in range(args.repeats):
            for side in order:
                begin = time.perf_counter()
                written = sides[side]()
                seconds[side].append(time.perf_counter() - begin)
                if written != batch * args.tokens:
                    raise RuntimeError(f"{side} wrote {written} tokens, not {batch * args.tokens}")
            order = order[1:] + order[:1]
    row: dict[str, Any] = {"batch": batch, "tokens": batch * args.tokens}
    row |= {side: {"tokens_per_s": spread([row["tokens"] / each for each in of])} for side, of in seconds.items()}
    medians = {side: statistics.median(of) for side, of in seconds.items()}
    others = [side for side in medians if side in ("generate", "continuous")]
    if "engine" in medians and others:
        row["engine_against_the_faster"] = round(min(medians[side] for side in others) / medians["engine"], 2)
    return row


@torch.no_grad()
def measure_guidance(batch: int, args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Time steps with and without guidance, in turns."""
    prompts = make_prompts(batch, args.prompt, VOCAB)
    capacity = batch * (args.prompt + args.tokens + 64)
    differences, plain, percents = [], [], []
    for _ in range(args.repeats):
        engines, sequences = [], []
        for structure in ("off", "guided"):
            options = {"structure": structure, "max_new_tokens": args.tokens, "do_sample": False}
            given = {"attention_mask": torch.ones_like(prompts), "eos_token_id": None, "pad_token_id": EOS}
            asked = read_requests(model, prompts, None, None, None, 0, options | given)
            cache = LogCache(model.config.num_hidden_layers, capacity)
            engines.append(Engine(model, model.tags, cache, max_num_seqs=batch))
            sequences.append([engines[-1].add(request) for request in asked.requests])
        pairs = list(steps_in_turns(engines, model.device))
        if [s.ids for s in sequences[0]] != [s.ids for s in sequences[1]] or engines[1].has_work:
            raise RuntimeError("with guidance another text was written")
        differences += [guided - off for off, guided in pairs]
        plain += [off for off, _ in pairs]
        middle = statistics.median(guided - off for off, guided in pairs)
        percents.append(100 * middle / statistics.median(off for off, _ in pairs))
    return {
        "steps": len(plain),
        "ms_per_step": round(1000 * statistics.median(plain), 4),
        "ms_of_guidance": round(1000 * statistics.median(differences), 4),
        "percent": round(100 * statistics.median(differences) / statistics.median(plain), 2),
        "percent_of_repeats": spread(percents),
    }


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 4, 8], help="prompts at once (default: 1 4 8)")
    parser.add_argument("--prompt", type=count, default=256, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=count, default=64, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--skip", nargs="+", choices=[*SIDES, "guidance"], default=[])
    args = parser.parse_args()
    if args.threads is not None:
        set_threads(args.threads)
    tags = make_tags()
    parallel, plain = make_models(tags, args.seed)
    silence_tags(plain, tags)
    paged = AutoModelForCausalLM.from_config(plain.config, dtype=torch.bfloat16).eval()
    paged.load_state_dict(plain.state_dict(), assign=True)
    result = {"benchmark": "autoregressive_cpu", **environment(), "weights_packed": can_pack(parallel)}
    show_environment(result)
    answers = sum(1 + args.repeats for side in SIDES if side not in args.skip)
    answers += 2 * args.repeats if "guidance" not in args.skip else 0
    passes = [(answers * args.tokens, answers * batch * (args.prompt + args.tokens)) for batch in args.batch]
    announce(seconds_of_passes(plain, passes))
    result["results"] = []
    for batch in shown(args.batch, "batch size"):
        row = measure(batch, args, (parallel, plain, paged))
        if "guidance" not in args.skip:
            row["guidance"] = measure_guidance(batch, args, parallel)
        result["results"].append(row)
        store(result, args.output)
        print(f"\nbatch {batch}, {row['tokens']} tokens")
        for side in SIDES:
            if side in row:
                print(f"  {side:12} {show(row[side]['tokens_per_s'], ' tok/s')}")
        if "guidance" in row:
            guidance = row["guidance"]
            print(
                f"  guidance takes {guidance['ms_of_guidance']} ms of a step of {guidance['ms_per_step']} ms, "
                f"{show(guidance['percent_of_repeats'], ' %')}"
            )
        if "engine_against_the_faster" in row:
            print(f"  engine {row['engine_against_the_faster']:.2f}x as fast as the faster of the others")
    finish(result, args.output)


if __name__ == "__main__":
    main()
