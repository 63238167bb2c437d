"""Decoding speed on a CPU: p paths at once, against one token after the other, and against the model calls alone.

A random Qwen2 of 0.24 B parameters continues a prompt of 256 tokens that ends inside a goal with p
outlines. The model writes ``</Goal>``, p paths of 64 tokens each (forced start and ``</Path>`` included) and the
conclusion. What it writes is random, the structure is forced by a logits processor. All sides run in one process, in
turns, on the same weights:

- engine: :class:`MultiverseEngine`, which packs bfloat16 weights where the CPU gains by it, as ``generate`` does.
- generate: ``model.generate`` of multiverse_hf.
- transformers: ``generate`` of the plain model, greedy, as many tokens after the same prompt.
- bare: the engine's forward passes in a loop without engine and grammar: the same weights, queries, mask shapes,
  cache, which it finds filled, and the argmax of every row.

With ``--write-goal`` the prompt ends before ``<Parallel>``: the outlines, which are sequential on every side, are then
written and counted as well. That is the losing case: many short paths, and each outline costs a step per token.

Time includes the prompt's own pass unless it says "decode". Ratios are of the medians over all repeats.

    python benchmarks/decode_cpu.py
    python benchmarks/decode_cpu.py --paths 1 2 4 8 16 --repeats 5 --output benchmarks/results/decode_cpu.json
    python benchmarks/decode_cpu.py --paths 8 --write-goal --threads 1
    python benchmarks/decode_cpu.py --paths 16 --skip transformers generate     # the engine's overhead alone, quickly
    python benchmarks/decode_cpu.py --paths 1 2 4 8 16 32 --batch 1 4 8 --skip generate --repeats 1
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from geometry import GEOMETRIES, make_config
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
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from workload import EOS, TEXT, make_goal, make_prompts, make_tags

from multiverse_hf.modeling.attention_packed import PACKED, Step, attend_sdpa
from multiverse_hf.modeling.cache import LogCache
from multiverse_hf.modeling.cpu import can_pack, packed_weights, using
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.modeling.sampling import argmax
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.modeling.threads import set_threads

SIDES = ("transformers", "generate", "engine", "bare")
GEOMETRY = "cpu-0.24b"
VOCAB = GEOMETRIES[GEOMETRY]["vocab_size"]
LONGEST = 16_384  # positions an answer may take


def make_models(
    tags: TagSet, seed: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Make the model with and without branches, over one set of weights."""
    config = make_config(GEOMETRY)
    torch.manual_seed(seed)
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    parallel = MultiverseForCausalLM.from_config(config, tags, dtype=dtype).eval()
    parallel.load_state_dict(plain.state_dict(), assign=True)
    return parallel, plain


class ForceBlock(LogitsProcessor):
    """Forces one block. How far a branch has come is the length of what it sees; all that differs is where to go on.

    Costs a few writes to the scores of all branches together, so that it is not what is measured.

    Args:
        goal: ids that open the block; the prompt ends with the first ``given`` of them, the last one is ``</Goal>``.
        prompt_length: tokens of the prompt.
        num_paths: paths of the block.
        path_tokens: tokens of each, forced start and ``</Path>`` included.
    """

    def __init__(
        self, tags: TagSet, goal: list[int], given: int, prompt_length: int, num_paths: int, path_tokens: int
    ) -> None:
        fork = prompt_length + len(goal) - given
        reduce = fork + num_paths * path_tokens + len(tags.reduce_prefix)
        self.forced = dict(enumerate(goal[given:], prompt_length))  # tokens seen -> the only next token
        self.forced[fork + path_tokens - 1] = tags.close("path")
        self.forced |= {reduce + 1: tags.close("conclusion"), reduce + 2: tags.close("parallel"), reduce + 3: EOS}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        token = self.forced.get(input_ids.shape[1])
        if token is None:
            scores[:, :TEXT] = -torch.inf  # free: any text
        else:
            scores[:] = -torch.inf
            scores[:, token] = 0
        return scores


@dataclass
class Workload:
    """One block to write, and what it must come out as."""

    prompts: torch.Tensor  # (batch, length)
    processor: ForceBlock
    num_paths: int
    num_tokens: int  # of one answer, end token included
    calls: list[tuple[dict[str, Any], Any]] = field(
        default_factory=list
    )  # of the engine: arguments, and slots written


def make_workload(
    tags: TagSet, prompt_tokens: int, num_paths: int, path_tokens: int, write_goal: bool, batch: int
) -> Workload:
    """Lay out one block of ``num_paths`` paths after each of ``batch`` random prompts."""
    goal = make_goal(tags, num_paths)
    given = 0 if write_goal else len(goal) - 1
    prompts = make_prompts(batch, prompt_tokens, VOCAB, goal[:given])
    processor = ForceBlock(tags, goal, given, prompt_tokens, num_paths, path_tokens)
    num_tokens = len(goal) - given + num_paths * path_tokens + len(tags.reduce_prefix) + 4
    return Workload(prompts, processor, num_paths, num_tokens)


@dataclass
class Run:
    """What one side did: seconds in all, and of each forward pass the time since the one before it."""

    num_tokens: int
    seconds: float
    turns: list[float]

    @property
    def decode_seconds(self) -> float:
        return self.seconds - self.turns[0]


def timed(model: PreTrainedModel, call: Callable[[], int]) -> Run:
    """Time a call and its forward passes."""
    ends: list[float] = []
    hook = model.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    begin = time.perf_counter()
    num_tokens = call()
    seconds = time.perf_counter() - begin
    hook.remove()
    return Run(num_tokens, seconds, [end - last for last, end in zip([begin, *ends], ends, strict=False)])


def check(stats: list[Any], work: Workload) -> int:
    """Check that each block came out as forced; give the number of tokens of all."""
    for each in stats:
        if (each.num_forks, each.max_width, each.num_tokens) != (1, work.num_paths, work.num_tokens):
            raise RuntimeError(f"expected {work.num_tokens} tokens, one fork of {work.num_paths} paths; got {each}")
    return sum(each.num_tokens for each in stats)


def run_engine(engine: MultiverseEngine, work: Workload) -> int:
    """Write the blocks with the engine."""
    results = engine.generate(
        list(work.prompts),
        logits_processor=[work.processor],
        max_new_tokens=LONGEST,
        max_paths=work.num_paths,
    )
    return check([result.stats for result in results], work)


def run_generate(model: PreTrainedModel, work: Workload) -> int:
    """Write the blocks with ``model.generate``."""
    output = model.generate(
        work.prompts,
        logits_processor=LogitsProcessorList([work.processor]),
        max_new_tokens=LONGEST,
        max_paths=work.num_paths,
        return_dict_in_generate=True,
    )
    return check(output.stats, work)


def run_transformers(model: PreTrainedModel, work: Workload, num_tokens: int) -> int:
    """Write as many tokens to each prompt, one after the other."""
    output = model.generate(
        work.prompts,
        attention_mask=torch.ones_like(work.prompts),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=None,
        pad_token_id=EOS,
    )
    return (output.shape[1] - work.prompts.shape[1]) * len(output)


@torch.no_grad()
def run_bare(model: PreTrainedModel, work: Workload) -> int:
    """Make the engine's model calls again, with nothing around them but what a loop needs."""
    own, model.config._attn_implementation = model.config._attn_implementation, PACKED
    cache = LogCache(model.config.num_hidden_layers, capacity(work))
    with using(packed_weights(model)):
        for arguments, cache.write in work.calls:
            step = Step(arguments["multiverse_step"].pieces, attend_sdpa)
            cache.read = slice(0, max(piece.keys.stop for piece in step.pieces))
            output = model(**arguments | {"multiverse_step": step}, past_key_values=cache, use_cache=True)
            argmax(output.logits[0].float()).tolist()  # a loop has to look at what it wrote
    model.config._attn_implementation = own
    return work.num_tokens * len(work.prompts)


def capacity(work: Workload) -> int:
    return len(work.prompts) * (work.prompts.shape[1] + work.num_tokens + 256)


def record_calls(model: PreTrainedModel, engine: MultiverseEngine, work: Workload) -> None:
    """Run the engine once and keep the arguments of its model calls."""
    names = ("input_ids", "position_ids", "attention_mask", "logits_to_keep", "multiverse_step")

    def keep(_module: Any, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        work.calls.append(({name: kwargs[name] for name in names}, kwargs["past_key_values"].write))

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    run_engine(engine, work)
    hook.remove()


def measure(
    models: tuple[PreTrainedModel, PreTrainedModel], work: Workload, args: argparse.Namespace
) -> dict[str, list[Run]]:
    """Run the sides ``--repeats`` times in turns, each time beginning with another."""
    parallel, plain = models
    with MultiverseEngine(parallel, max_cache_tokens=capacity(work)) as engine:
        if "bare" not in args.skip:
            record_calls(parallel, engine, work)
        calls = {
            "transformers": (plain, lambda: run_transformers(plain, work, work.num_tokens)),
            "engine": (parallel, lambda: run_engine(engine, work)),
            "generate": (parallel, lambda: run_generate(parallel, work)),
            "bare": (parallel, lambda: run_bare(parallel, work)),
        }
        calls = {side: call for side, call in calls.items() if side not in args.skip}
        run_engine(engine, work)
        if "transformers" in calls:
            run_transformers(plain, work, 8)
        runs: dict[str, list[Run]] = {side: [] for side in calls}
        order = list(calls)
        for _ in range(args.repeats):
            for side in order:
                runs[side].append(timed(*calls[side]))
            order = order[1:] + order[:1]
    return runs


def median(runs: list[Run], decode: bool = False) -> float:
    return statistics.median(run.decode_seconds if decode else run.seconds for run in runs)


def summarize(runs: dict[str, list[Run]], work: Workload) -> dict[str, Any]:
    """Check that all sides did the same work; give speeds, ratios and overhead."""
    due = work.num_tokens * len(work.prompts)
    wrong = {side: run.num_tokens for side, of in runs.items() for run in of if run.num_tokens != due}
    if wrong:
        raise RuntimeError(f"every side has to write {due} tokens, got {wrong}")
    result: dict[str, Any] = {"paths": work.num_paths, "batch": len(work.prompts), "tokens": due}
    for side, of in runs.items():
        result[side] = {
            "forward_passes": len(of[0].turns),
            "tokens_per_s": spread([run.num_tokens / run.seconds for run in of]),
            "decode_tokens_per_s": spread([run.num_tokens / run.decode_seconds for run in of]),
            "ms_per_step": spread([1000 * statistics.median(run.turns[1:]) for run in of]),
            "ms_of_last_steps": spread([1000 * statistics.median(run.turns[-24:-8]) for run in of]),
        }
    for side in ("engine", "generate"):
        if side in runs and "transformers" in runs:
            plain = runs["transformers"]
            result[f"{side}_speedup"] = round(median(plain) / median(runs[side]), 2)
            result[f"{side}_decode_speedup"] = round(median(plain, True) / median(runs[side], True), 2)
    if "engine" in runs and "generate" in runs:
        result["generate_of_engine"] = round(median(runs["engine"]) / median(runs["generate"]), 3)
    if "engine" in runs and "bare" in runs:
        if result["engine"]["forward_passes"] != result["bare"]["forward_passes"]:
            raise RuntimeError("the bare loop has to make the engine's forward passes")
        result["overhead_percent"] = round(100 * (median(runs["engine"]) / median(runs["bare"]) - 1), 2)
        least = [min(run.seconds for run in runs[side]) for side in ("engine", "bare")]
        result["least_overhead_percent"] = round(100 * (least[0] / least[1] - 1), 2)
        if "transformers" in runs:
            result["bare_speedup"] = round(median(runs["transformers"]) / median(runs["bare"]), 2)
    return result


def print_result(result: dict[str, Any]) -> None:
    """Print one number of paths, for people."""
    print(f"\n{result['paths']} paths, {result['tokens']} tokens, batch {result['batch']}")
    for side in SIDES:
        if side in result:
            row = result[side]
            speed, step = show(row["tokens_per_s"], " tok/s"), show(row["ms_per_step"], " ms/step")
            print(
                f"  {side:13} {row['forward_passes']:5} forward passes   {speed:32} {step:28} "
                f"last {row['ms_of_last_steps']['median']:.1f}"
            )
    for side in ("engine", "generate"):
        if f"{side}_speedup" in result:
            print(
                f"  {side} {result[f'{side}_speedup']:.2f}x as fast as transformers "
                f"(decode only {result[f'{side}_decode_speedup']:.2f}x)"
            )
    if "overhead_percent" in result:
        print(
            f"  engine over bare loop {result['overhead_percent']} % "
            f"(least time of each {result['least_overhead_percent']} %)"
        )
    if "generate_of_engine" in result:
        print(f"  generate {result['generate_of_engine']} of the engine's speed")
    if "bare_speedup" in result:
        print(f"  bare loop {result['bare_speedup']:.2f}x as fast as transformers")


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--paths", type=count, nargs="+", default=[8, 16], help="paths of the block (default: 8 16)")
    parser.add_argument("--batch", type=count, nargs="+", default=[1], help="prompts at once (default: 1)")
    parser.add_argument("--path-tokens", type=count, default=64, help="tokens a path (default: %(default)s)")
    parser.add_argument("--prompt", type=count, default=256, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--write-goal", action="store_true", help="have the outlines written instead of given")
    parser.add_argument("--skip", nargs="+", choices=SIDES, default=[], help="sides to leave out")
    args = parser.parse_args()
    if args.threads is not None:
        set_threads(args.threads)

    tags = make_tags()
    models = make_models(tags, args.seed, getattr(torch, args.dtype))
    result = {"benchmark": "decode_cpu", **environment()}
    num_parameters = sum(parameter.numel() for parameter in models[0].parameters())
    result |= {"parameters": num_parameters, "dtype": args.dtype, "weights_packed": can_pack(models[0])}
    result |= {"prompt_tokens": args.prompt, "path_tokens": args.path_tokens, "goal_written": args.write_goal}
    show_environment(result)
    print(f"random Qwen2, {num_parameters / 1e9:.2f} B parameters, {args.dtype}, prompt of {args.prompt} tokens")
    result["results"] = []
    works = [
        make_workload(tags, args.prompt, num_paths, args.path_tokens, args.write_goal, batch)
        for batch, num_paths in itertools.product(args.batch, args.paths)
    ]
    sizes = [(work.num_tokens, len(work.prompts) * (args.prompt + work.num_tokens)) for work in works]
    passes = [(args.path_tokens, num_tokens) for _, num_tokens in sizes] * (2 + 3 * args.repeats)
    passes += [] if "transformers" in args.skip else sizes * args.repeats
    announce(seconds_of_passes(models[1], passes))
    for batch, num_paths in shown(list(itertools.product(args.batch, args.paths)), "workload"):
        work = make_workload(tags, args.prompt, num_paths, args.path_tokens, args.write_goal, batch)
        row = summarize(measure(models, work, args), work)
        result["results"].append(row)
        store(result, args.output)
        print_result(row)
    finish(result, args.output)


if __name__ == "__main__":
    main()
