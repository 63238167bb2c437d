"""Ordinary autoregressive work on a CPU: the engine with ``structure="off"`` against transformers.

A random Qwen2 of 0.24 B parameters in bfloat16 writes 64 tokens to each of B prompts of 256, greedily. Sides, in
turns, in one process, on the same weights:

- engine: ``MultiverseEngine`` with ``structure="off"``.
- guided: the same with ``structure="guided"``, of a model that writes no tag: what guidance and bookkeeping cost.
- generate: ``generate`` of the plain model on the whole batch.
- continuous: ``generate_batch`` of the plain model, transformers' continuous batching.

All sides write the same number of tokens; the time includes the prompts' own passes. Ratios are of the medians.

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
from report import count, environment, finish, make_parser, show, show_environment, spread, store
from transformers import AutoModelForCausalLM, GenerationConfig
from workload import EOS, make_prompts, make_tags, silence_tags

from multiverse_hf import MultiverseEngine
from multiverse_hf.modeling.decoding import can_pack

SIDES = ("engine", "guided", "generate", "continuous")


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
        outputs = paged.generate_batch(prompts.tolist(), generation_config=config)
        return sum(len(output.generated_tokens) for output in outputs.values())

    with MultiverseEngine(parallel, max_cache_tokens=capacity) as front:

        def engine(structure: str = "off") -> int:
            results = front.generate(list(prompts), structure=structure, eos_token_id=None, **greedy)
            if any(result.stats.num_forks for result in results):
                raise RuntimeError("a model whose tags are silenced wrote a block")
            return sum(len(result.ids) for result in results)

        sides: dict[str, Callable[[], int]] = {
            "engine": engine,
            "guided": lambda: engine("guided"),
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
    if "engine" in medians and "guided" in medians:
        row["guidance_percent"] = round(100 * (medians["guided"] / medians["engine"] - 1), 2)
    return row


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 4, 8], help="prompts at once (default: 1 4 8)")
    parser.add_argument("--prompt", type=count, default=256, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=count, default=64, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--skip", nargs="+", choices=SIDES, default=[])
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tags = make_tags()
    parallel, plain = make_models(tags, args.seed)
    silence_tags(plain, tags)
    paged = AutoModelForCausalLM.from_config(plain.config, dtype=torch.bfloat16).eval()
    paged.load_state_dict(plain.state_dict(), assign=True)
    result = {"benchmark": "autoregressive_cpu", **environment(), "weights_packed": can_pack(parallel)}
    show_environment(result)
    result["results"] = []
    for batch in args.batch:
        row = measure(batch, args, (parallel, plain, paged))
        result["results"].append(row)
        store(result, args.output)
        print(f"\nbatch {batch}, {row['tokens']} tokens")
        for side in SIDES:
            if side in row:
                print(f"  {side:12} {show(row[side]['tokens_per_s'], ' tok/s')}")
        if "guidance_percent" in row:
            print(f"  guidance takes {row['guidance_percent']} % of the engine's time")
        if "engine_against_the_faster" in row:
            print(f"  engine {row['engine_against_the_faster']:.2f}x as fast as the faster of the others")
    finish(result, args.output)


if __name__ == "__main__":
    main()
