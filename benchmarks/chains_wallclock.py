"""Wall clock of whole answers: the embedded model, in parallel against autoregressive, on one problem set.

Flat chains problems, greedy, five sides that take turns on every problem:

- parallel: ``model.generate`` with the parallel suffix; paths are written at the same time.
- off: the same prompt on the same engine with ``structure="off"``: the same document, autoregressively.
- off, sequential suffix: the engine, autoregressively, with the prompt that asks for a sequential answer.
- transformers: ``generate`` of the plain ``AutoModelForCausalLM`` on the same checkpoint and the parallel suffix.
- transformers, sequential suffix.

Prints for every side seconds, tokens and accuracy, and how many times faster parallel is than each of the others,
problem by problem. It counts where ``off`` and ``transformers`` wrote the same ids: both are greedy, so all should.

    python benchmarks/chains_wallclock.py
    python benchmarks/chains_wallclock.py --model path/to/checkpoint --problems 20 --chains 8 --threads 1
    python benchmarks/chains_wallclock.py --output benchmarks/results/chains_wallclock.json
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import announce, count, environment, finish, make_parser, show, show_environment, shown, spread
from transformers import AutoModelForCausalLM

from multiverse_hf.checkpoints import EMBEDDED, Attention, Checkpoint, Dtype, load_model, open_checkpoint
from multiverse_hf.data.chains import MAX_CHAINS, ChainsProblem, Kind, is_correct, sample_problem
from multiverse_hf.errors import CommandError
from multiverse_hf.modeling.tags import encode_prompt
from multiverse_hf.modeling.threads import set_threads

TOKENS_OF_CHAIN = 110  # about


@dataclass(frozen=True)
class Side:
    """One way to answer: whether the prompt asks for a parallel answer, and what continues it."""

    parallel_prompt: bool
    generate: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Answer:
    """What one side wrote to one problem."""

    seconds: float
    ids: tuple[int, ...]
    correct: bool


def make_sides(checkpoint: Checkpoint, max_new_tokens: int) -> dict[str, Side]:
    """Load the checkpoint with and without branches."""
    branching = load_model(checkpoint, Dtype.AUTO, Attention.SDPA, device="cpu", threads=None)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()

    def engine(structure: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda ids: branching.generate(ids, structure=structure, do_sample=False, max_new_tokens=max_new_tokens)

    def transformers(ids: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(ids)
        return plain.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)

    return {
        "parallel": Side(True, engine("guided")),
        "off": Side(True, engine("off")),
        "transformers": Side(True, transformers),
        "off, sequential suffix": Side(False, engine("off")),
        "transformers, sequential suffix": Side(False, transformers),
    }


def answer(side: Side, problem: ChainsProblem, tokenizer: Any) -> Answer:
    """Time one side on one problem, from prompt ids to answer ids."""
    prompt = torch.tensor([encode_prompt(tokenizer, problem.prompt(side.parallel_prompt))])
    begin = time.perf_counter()
    output = side.generate(prompt)
    seconds = time.perf_counter() - begin
    ids = output[0, prompt.shape[1] :].tolist()
    return Answer(seconds, tuple(ids), is_correct(problem, tokenizer.decode(ids, skip_special_tokens=True)))


def summarize(answers: dict[str, list[Answer]]) -> dict[str, Any]:
    """Return seconds, tokens and accuracy of each side, and how much faster parallel is, answer by answer."""
    result: dict[str, Any] = {"sides": {}, "speedup": {}}
    for name, side in answers.items():
        result["sides"][name] = {
            "seconds": spread([a.seconds for a in side]),
            "tokens": spread([float(len(a.ids)) for a in side]),
            "tokens_per_s": spread([len(a.ids) / a.seconds for a in side]),
            "accuracy": round(statistics.mean(a.correct for a in side), 4),
        }
        if name != "parallel":
            pairs = zip(side, answers["parallel"], strict=True)
            result["speedup"][name] = spread([slow.seconds / fast.seconds for slow, fast in pairs])
            total = sum(a.seconds for a in side) / sum(a.seconds for a in answers["parallel"])
            result["speedup"][name]["total"] = round(total, 4)
    for suffix in ("", ", sequential suffix"):
        pairs = list(zip(answers["off" + suffix], answers["transformers" + suffix], strict=True))
        same = sum(ours.ids == theirs.ids for ours, theirs in pairs)
        result["sides"]["off" + suffix]["same_ids_as_transformers"] = same
    return result


def print_result(result: dict[str, Any]) -> None:
    """Print the sides, for people."""
    print(f"\n{'':32}{'seconds an answer':30}{'tokens':>8}{'accuracy':>10}   parallel is faster by")
    for name, side in result["sides"].items():
        ratio = show(result["speedup"][name], "x") if name in result["speedup"] else ""
        seconds, tokens = show(side["seconds"], " s"), side["tokens"]["median"]
        print(f"{name:32}{seconds:30}{tokens:8.0f}{side['accuracy']:10.3f}   {ratio}")
    for name, side in result["sides"].items():
        if "same_ids_as_transformers" in side:
            same = side["same_ids_as_transformers"]
            print(f"{name}: {same} of {result['answers']} answers are those of transformers")


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint folder (default: the embedded model)")
    parser.add_argument("--problems", type=count, default=5, help="problems (default: %(default)s)")
    parser.add_argument("--chains", type=int, default=8, help="chains of each problem (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=count, default=2560, help="bound on an answer (default: %(default)s)")
    args = parser.parse_args()
    if args.threads is not None:
        set_threads(args.threads)
    if not 2 <= args.chains <= MAX_CHAINS:
        parser.error(f"--chains must be from 2 to {MAX_CHAINS}, got {args.chains}")
    try:
        checkpoint = open_checkpoint(str(args.model))
        sides = make_sides(checkpoint, args.max_new_tokens)
    except CommandError as err:
        parser.error(str(err))
    tokenizer = checkpoint.tokenizer
    rng = random.Random(args.seed)
    problems = [sample_problem(rng, Kind.FLAT, args.chains) for _ in range(args.problems)]
    result = {"benchmark": "chains_wallclock", **environment(), "model": args.model.name}
    show_environment(result)
    warm_up = sample_problem(rng, Kind.FLAT, 2, max_ops=1)
    short = [answer(side, warm_up, tokenizer) for side in sides.values()]
    tokens = args.chains * TOKENS_OF_CHAIN * len(problems) * args.repeats
    announce(sum(tokens * each.seconds / len(each.ids) for each in short))

    answers: dict[str, list[Answer]] = {name: [] for name in sides}
    names = list(sides)
    for problem in shown(problems * args.repeats, "problem"):
        for name in names:
            answers[name].append(answer(sides[name], problem, tokenizer))
        names = names[1:] + names[:1]  # another side begins, so that none profits from its place
    result |= {"chains": args.chains, "answers": len(problems) * args.repeats, **summarize(answers)}
    print_result(result)
    finish(result, args.output)


if __name__ == "__main__":
    main()
