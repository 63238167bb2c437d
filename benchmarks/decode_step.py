"""A decoding step against what the device can do, and against transformers.

A model with random weights has read a prompt of a given length and goes on from it. Timed is one step, as a function
of the branches it writes a token of:

- floor: the bytes that every step reads, weights and keys and values of the prompt once, over the bandwidth of a large
  copy on this device, measured first. No engine can be faster while steps are bound by memory; the rate of a large
  matrix product, measured beside it, says whether they are.
- engine: one block of so many paths; 1 is ordinary autoregressive writing (``structure="off"``).
- generate, static, continuous: ``generate`` of the plain model on the same weights, the same with a compiled static
  cache, and ``generate_batch``, transformers' continuous batching. Each writes one token a step. Their step is the
  difference of writing twice as many tokens and writing so many, over so many: the prompt's pass is in neither.

Steps of the engine are those in which all branches write one token. Given are medians, and times the floor. A side
that does not run here is reported with its error, and the others go on.

    python benchmarks/decode_step.py
    python benchmarks/decode_step.py --contexts 1024 --branches 1 8 --skip static --repeats 1
    python benchmarks/decode_step.py --geometry qwen2.5-7b --device cuda --contexts 1024 8192 --output step.json
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from geometry import (
    DTYPE,
    Load,
    add_model_arguments,
    count_parameters,
    describe_model,
    make_config,
    make_model,
    peak_memory,
    plan_cache,
)
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
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from workload import EOS, make_goal, make_prompts, make_tags, plan_block, small_cache, steps_in_turns

from multiverse_hf.evaluation.experiments.timing import synchronize
from multiverse_hf.modeling.cache import LogCache
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.generation import read_requests
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.modeling.threads import set_threads

SIDES = ("generate", "static", "continuous")  # of transformers
CONTEXTS = {"cpu": [256], "cuda": [1024, 8192, 32_000]}  # 32,768 positions are all that 0.5B has
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows and columns
CHUNK = 8192  # prompt tokens read at once


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Return the median time of a call, after one that is not timed."""
    times = []
    for _ in range(repeats + 1):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def measure_limits(device: torch.device) -> dict[str, float]:
    """Measure the bandwidth of a large copy, bytes read and written, and the rate of a large matrix product."""
    source = torch.randint(0, 255, (COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)
    size = MATRIX[device.type]
    matrix = torch.randn(size, size, device=device).to(DTYPE)
    output = torch.empty_like(matrix)
    computed = 2 * size**3 / seconds_of(lambda: torch.mm(matrix, matrix, out=output), device)
    return {"copy_bytes_per_s": copied, "matrix_flop_per_s": computed}


def bytes_of_step(model: PreTrainedModel, context: int) -> tuple[int, int]:
    """Count what a step cannot but read: weights, but for embeddings that are looked up only; keys and values."""
    config, embeddings = model.config, model.get_input_embeddings().weight
    weights = sum(parameter.nbytes for parameter in model.parameters())
    if model.get_output_embeddings().weight is not embeddings:
        weights -= embeddings.nbytes
    head_dim = config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * DTYPE.itemsize
    return weights, context * token


@torch.no_grad()
def time_engine(
    model: Any, tags: TagSet, prompt: torch.Tensor, num_branches: int, cache_tokens: int, args: argparse.Namespace
) -> list[float]:
    """Time the engine's steps in which all branches write a token, in seconds; the first are not timed.

    Raises:
        RuntimeError: if the answer did not come out as asked.
    """
    answer = plan_block(tags, num_branches, 2 * args.steps)
    asked = read_requests(model, prompt, None, None, None, 0, answer.options)
    cache = LogCache(model.config.num_hidden_layers, cache_tokens)
    decoding = "static" if args.device.type == "cuda" else "packed"
    engine = Engine(model, tags, cache, decoding=decoding, prefill_chunk=CHUNK)
    sequence = engine.add(asked.requests[0])
    times = [
        seconds
        for (seconds,) in steps_in_turns([engine], args.device)
        if len(sequence.live) == len(sequence.pending) == num_branches
    ]
    answer.check(sequence.stats)
    engine.runner.free()
    return times[args.steps // 2 : args.steps // 2 + args.steps]


def time_transformers(side: str, model: Any, prompt: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """Time a step of transformers ``--repeats`` times, in seconds.

    Raises:
        RuntimeError: if it wrote another number of tokens.
    """
    # a token that ends nothing: both write all they are asked for
    options = {"do_sample": False, "pad_token_id": EOS}

    def write(num_tokens: int) -> int:
        if side == "continuous":
            config = GenerationConfig(**options, max_new_tokens=num_tokens, eos_token_id=-1)
            (output,) = model.generate_batch(
                prompt.tolist(), generation_config=config, continuous_batching_config=small_cache()
            ).values()
            return len(output.generated_tokens)
        given = options | {"eos_token_id": None, "max_new_tokens": num_tokens}
        if side == "static":
            given["cache_implementation"] = "static"
            given["max_length"] = None
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)
        return output.shape[1] - prompt.shape[1]

    write(2 * args.steps)  # compiles what it compiles
    times = []
    for _ in range(args.repeats):
        seconds = []
        for num_tokens in (args.steps, 2 * args.steps):
            synchronize(args.device)
            begin = time.perf_counter()
            written = write(num_tokens)
            synchronize(args.device)
            seconds.append(time.perf_counter() - begin)
            if written != num_tokens:
                raise RuntimeError(f"{side} wrote {written} tokens, not {num_tokens}")
        times.append((seconds[1] - seconds[0]) / args.steps)
    return times


def make_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Make the plain model over the same weights, which are not copied."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.base_model.rotary_emb = model.base_model.rotary_emb  # its buffers are no part of the state
    return plain.eval()


def measure(
    model: PreTrainedModel, tags: TagSet, context: int, cache_tokens: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Time all sides on one length of prompt."""
    weights, states = bytes_of_step(model, context)
    row: dict[str, Any] = {
        "context": context,
        "weight_bytes": weights,
        "state_bytes": states,
        "engine": [],
        "errors": {},
    }
    plain = make_plain(model)
    prompt = make_prompts(1, context, model.config.vocab_size).to(args.device)
    for side in SIDES:
        if side in args.skip:
            continue
        try:
            row[side] = {"ms_per_step": spread([1000 * each for each in time_transformers(side, plain, prompt, args)])}
        except Exception as err:  # a peer that cannot do it here is no reason to lose the rest
            row["errors"][side] = f"{type(err).__name__}: {err}"[:500]
        finally:
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
    for num_branches in args.branches:
        goal = make_goal(tags, num_branches)[:-1] if num_branches > 1 else []
        prompt = make_prompts(1, context, model.config.vocab_size, goal).to(args.device)
        times: list[float] = []
        for _ in range(args.repeats):
            times += time_engine(model, tags, prompt, num_branches, cache_tokens, args)
        milliseconds = spread([1000 * each for each in times])
        row["engine"].append({"branches": num_branches, "steps": len(times), "ms_per_step": milliseconds})
    return row


def summarize(row: dict[str, Any], limits: dict[str, float]) -> None:
    """Add the floor, and what is made of it."""
    row["floor_ms"] = round(1000 * (row["weight_bytes"] + row["state_bytes"]) / limits["copy_bytes_per_s"], 4)
    peers = [row[side]["ms_per_step"]["median"] for side in SIDES if side in row]
    lone = next((each["ms_per_step"]["median"] for each in row["engine"] if each["branches"] == 1), None)
    for each in row["engine"]:
        median = each["ms_per_step"]["median"]
        each["of_floor"] = round(median / row["floor_ms"], 3)
        each["of_one_branch"] = None if lone is None else round(median / lone, 3)
        # tokens a second against the faster of transformers' ways, which write one token a step
        each["against_transformers"] = round(each["branches"] * min(peers) / median, 2) if peers else None


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    add_model_arguments(parser)
    parser.add_argument("--branches", type=count, nargs="+", default=[1, 2, 4, 8, 16, 32], help="branches of a step")
    parser.add_argument(
        "--contexts", type=count, nargs="+", help="tokens of the prompt (default: 256, on a GPU 1024 8192 32000)"
    )
    parser.add_argument("--steps", type=count, default=32, help="steps that are timed (default: %(default)s)")
    parser.add_argument("--skip", nargs="+", choices=SIDES, default=[], help="ways of transformers to leave out")
    args = parser.parse_args()
    if args.threads is not None:
        set_threads(args.threads)
    args.branches = sorted(set(args.branches))
    contexts = sorted(set(args.contexts or CONTEXTS[args.device.type]))
    tags = make_tags(newlines=False)
    try:
        answers = [plan_block(tags, number, 2 * args.steps) for number in args.branches]
        for context in contexts:
            make_prompts(1, context, make_config(args.geometry).vocab_size, make_goal(tags, args.branches[-1])[:-1])
        num_parameters = count_parameters(args.geometry, tags)
        most = max(answer.num_tokens for answer in answers)
        load = Load(1, args.branches[-1], contexts[-1], most, max(answer.length for answer in answers))
        cache_tokens = plan_cache(args.geometry, args.device, num_parameters, load)
    except ValueError as err:
        parser.error(str(err))
    result = {"benchmark": "decode_step", **environment(args.device)}
    show_environment(result)
    print(f"random {args.geometry}, {num_parameters / 1e9:.2f} B parameters, bfloat16")
    limits = measure_limits(args.device)
    print(
        f"a large copy moves {limits['copy_bytes_per_s'] / 1e9:.0f} GB/s, a large product of bfloat16 matrices makes "
        f"{limits['matrix_flop_per_s'] / 1e12:.2f} TFLOP/s"
    )
    model = make_model(args.geometry, args.device, tags, args.seed)
    result |= describe_model(args.geometry, model, num_parameters) | limits
    result |= {"steps": args.steps, "repeats": args.repeats, "results": []}
    written = [(2 * args.steps, 2 * args.steps * number) for number in args.branches] * args.repeats  # by the engine
    others = len(set(SIDES) - set(args.skip))
    written += [(args.steps, args.steps)] * (others * (2 + 3 * args.repeats))
    prompts = len(args.branches) * args.repeats + others * (1 + 2 * args.repeats)
    read = [(prompts, prompts * context) for context in contexts]
    announce(seconds_of_passes(model, written * len(contexts) + read))
    for context in shown(contexts, "context"):
        row = measure(model, tags, context, cache_tokens, args)
        summarize(row, limits)
        result["results"].append(row)
        store(result, args.output)
        print(f"\nprompt of {context} tokens; floor {row['floor_ms']:.2f} ms a step")
        for side in SIDES:
            if side in row:
                print(f"  {side:10} {show(row[side]['ms_per_step'], ' ms')}")
            elif side in row["errors"]:
                print(f"  {side:10} does not run here: {row['errors'][side].splitlines()[0][:160]}")
        for each in row["engine"]:
            versus = (
                "" if each["against_transformers"] is None else f", {each['against_transformers']:.1f} x transformers"
            )
            lone = "" if each["of_one_branch"] is None else f", {each['of_one_branch']:.2f} x one branch"
            step = f"{each['branches']:2} branches {show(each['ms_per_step'], ' ms')}"
            print(f"  {step}: {each['of_floor']:.2f} x the floor{lone}{versus}")
    result["peak_memory_bytes"] = peak_memory(args.device)
    finish(result, args.output)


if __name__ == "__main__":
    main()
