"""Drafts inside branches: how many steps and how much time they save, where they help and where they cannot.

Greedy, except for the last work, and each side takes its turn on each batch of prompts:

- answers: the engine on questions, without drafts, with ``speculate="auto"`` and with a fixed number. The questions
  are chains for the embedded model, or rows of ``heldout.jsonl`` of recipes/smollm2-135m/make_data.py.
- copy: a text that repeats itself, with ``structure="off"``: the engine without drafts and with them, and ``generate``
  of transformers with and without ``prompt_lookup_num_tokens``.
- noise: text drawn at temperature 5, in which no draft is right: what drafts cost where they cannot help.

All sides of a work must write the same ids. Prints seconds, steps, and drafts for each side, and how many times faster
each is than the first. The plot shows the steps of ``answers`` by the number of branches that were being written.

    python benchmarks/speculation.py
    python benchmarks/speculation.py --model runs/smollm2-135m/multiverse --dtype float32 --problems 1 \
        --questions runs/smollm2-135m/data/heldout.jsonl --plot docs/engine/speculation.png
"""

import collections
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plots import plot_file, save
from report import announce, count, environment, finish, make_parser, show, show_environment, shown, spread, store
from transformers import AutoModelForCausalLM
from twin_wallclock import pad_left, read_questions

from multiverse_hf import MultiverseEngine
from multiverse_hf.checkpoints import EMBEDDED, Attention, Dtype, load_model, open_checkpoint
from multiverse_hf.data.chains import Kind, sample_problem
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.figures import make_figure
from multiverse_hf.modeling.tags import encode_prompt
from multiverse_hf.modeling.threads import set_threads

Ids = list[list[int]]
COPIED = (
    "The tortoise walked along the bank of the river. It had a long way to go, and the sun was high. "
    "By noon it reached the old mill, where the water was cool and the grass was green. "
)


class Engine:
    """One side: the engine with some number of drafts, which counts its steps by the branches that are written."""

    def __init__(self, model: Any, tokenizer: Any, max_num_seqs: int, **options: Any) -> None:
        self.engine, self.options = MultiverseEngine(model, tokenizer, max_num_seqs=max_num_seqs), options
        self.engine.add_step_callback(self._count)
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.steps: collections.Counter[int] = collections.Counter()
        self.drafted = self.accepted = 0
        self.seen = self.engine.memory()["num_steps"]

    def _count(self) -> None:
        memory = self.engine.memory()
        if memory["num_steps"] > self.seen:  # it is called where there is nothing to do, too
            self.steps[memory["num_branches"]] += 1
        self.seen = memory["num_steps"]

    def __call__(self, prompts: Ids) -> Ids:
        results = self.engine.generate(prompts, **self.options)
        self.drafted += sum(result.stats.num_drafted for result in results)
        self.accepted += sum(result.stats.num_accepted for result in results)
        return [list(result.ids) for result in results]


def transformers_side(model: Any, pad: int, **options: Any) -> Callable[[Ids], Ids]:
    """Return the side that calls ``generate`` of a plain model, one prompt at a time, as lookup needs it."""

    def write(prompts: Ids) -> Ids:
        ids, mask = pad_left(prompts, pad)
        output = model.generate(ids, attention_mask=mask, pad_token_id=pad, **options)
        return output[:, ids.shape[1] :].tolist()

    return write


def measure(sides: dict[str, Callable[[Ids], Ids]], batches: list[Ids], name: str) -> dict[str, Any]:
    """Have all sides write to each batch in turns, and return their figures.

    Raises:
        SystemExit: if two sides wrote different ids.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    order, tokens = list(sides), 0
    for side in order:  # warms up, and lets auto learn what steps cost
        sides[side](batches[0])
        if isinstance(sides[side], Engine):
            sides[side].reset()
    for batch in shown(batches, f"batch of {name}"):
        written = {}
        for side in order:
            begin = time.perf_counter()
            written[side] = sides[side](batch)
            seconds[side].append(time.perf_counter() - begin)
        first = next(iter(written.values()))
        if any(ids != first for ids in written.values()):
            raise SystemExit(f"{name}: the sides wrote different ids; these are no measurements")
        tokens += sum(map(len, first))
        order = order[1:] + order[:1]  # another side begins, so that none profits from its place
    result: dict[str, Any] = {"tokens": tokens, "sides": {}}
    slow = next(iter(sides))
    for side, own in seconds.items():
        figures = result["sides"][side] = {"seconds": spread(own), "total": round(sum(own), 3)}
        pairs = zip(seconds[slow], own, strict=True)
        figures["speedup"] = spread([a / b for a, b in pairs]) | {"total": round(sum(seconds[slow]) / sum(own), 4)}
        if isinstance(engine := sides[side], Engine):
            steps = sorted(engine.steps.items())
            figures |= {"steps": sum(engine.steps.values()), "steps_by_branches": {str(k): v for k, v in steps}}
            figures |= {"drafted": engine.drafted, "accepted": engine.accepted}
    print(f"\n{name}: {tokens} tokens")
    print(f"{'':24}{'seconds a batch':28}{'steps':>8}{'drafted':>9}{'right':>8}   faster by")
    for side, each in result["sides"].items():
        counts = [f"{each.get(key, ''):>{width}}" for key, width in (("steps", 8), ("drafted", 9), ("accepted", 8))]
        print(f"{side:24}{show(each['seconds'], ' s'):28}{''.join(counts)}   {show(each['speedup'], 'x')}")
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the steps of the first batch size by the number of branches, for each side."""
    figure, (axes,) = make_figure()
    sides = next(iter(result["answers"].values()))["sides"]
    widths = sorted({int(width) for side in sides.values() for width in side["steps_by_branches"]} - {0})
    for place, (name, side) in enumerate(sides.items()):
        heights = [side["steps_by_branches"].get(str(width), 0) for width in widths]
        shift = (place - (len(sides) - 1) / 2) / (len(sides) + 1)
        axes.bar([at + shift for at in range(len(widths))], heights, 1 / (len(sides) + 1), label=name)
    axes.set_xticks(range(len(widths)), [str(width) for width in widths])
    axes.set(xlabel="branches being written", ylabel="steps")
    axes.legend(title="speculate")
    save(figure, path)


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--model", default=EMBEDDED, help="checkpoint of a parallel model (default: %(default)s)")
    parser.add_argument("--questions", type=Path, help="heldout.jsonl of make_data.py; by default chains")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these families of the questions")
    parser.add_argument("--problems", type=count, default=8, help="questions, of each family (default: %(default)s)")
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--drafts", type=count, default=4, help="the fixed number of drafts (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: auto)")
    parser.add_argument("--max-new-tokens", type=count, default=1024, help="bound on an answer (default: %(default)s)")
    parser.add_argument("--tokens", type=count, default=200, help="tokens of copy and noise (default: %(default)s)")
    parser.add_argument("--plot", type=plot_file, help="draw the steps by branches to this PNG file")
    args = parser.parse_args()
    if args.threads is not None:
        set_threads(args.threads)
    try:
        checkpoint = open_checkpoint(str(args.model))
        if args.questions is not None:
            questions = [row["question"] for row in read_questions(args.questions, args.families, args.problems)]
        else:
            rng = random.Random(args.seed)
            questions = [str(sample_problem(rng, Kind.FLAT, 4)) for _ in range(args.problems)]
        model = load_model(checkpoint, Dtype(args.dtype), Attention.SDPA, "cpu", None)
    except CommandError as err:
        parser.error(str(err))
    tokenizer, pad = checkpoint.tokenizer, checkpoint.tokenizer.pad_token_id
    plain = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=model.dtype).eval()
    result: dict[str, Any] = {"benchmark": "speculation", "model": Path(str(args.model)).name, **environment()}
    result |= {"dtype": str(model.dtype).removeprefix("torch."), "answers": {}}
    show_environment(result)

    def sides(size: int, **options: Any) -> dict[str, Any]:
        return {str(s): Engine(model, tokenizer, size, speculate=s, **options) for s in ("off", "auto", args.drafts)}

    prompts = [encode_prompt(tokenizer, Suffix.PARALLEL.end(question.strip())) for question in questions]
    begin = time.perf_counter()
    sides(1, do_sample=False, max_new_tokens=args.max_new_tokens)["off"](prompts[:1])
    announce((time.perf_counter() - begin) * 3 * (len(prompts) * args.repeats * len(args.batch) + 4))
    for size in args.batch:
        batches = [prompts[at : at + size] for at in range(0, len(prompts), size)] * args.repeats
        own = sides(size, do_sample=False, max_new_tokens=args.max_new_tokens)
        result["answers"][str(size)] = measure(own, batches, f"answers, batch {size}")
        store(result, args.output)
    if args.plot is not None:
        draw(result, args.plot)
    greedy = {"do_sample": False, "max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
    own = {f"engine, {name}": side for name, side in sides(1, structure="off", **greedy).items()}
    own["transformers"] = transformers_side(plain, pad, **greedy)
    own["transformers, lookup"] = transformers_side(plain, pad, prompt_lookup_num_tokens=10, **greedy)
    copied = tokenizer(COPIED * 3)["input_ids"]
    result["copy"] = measure(own, [[copied]] * max(3, args.repeats), "copy")
    drawn = {"do_sample": True, "temperature": 5.0, "top_k": 0, "seed": args.seed, "max_new_tokens": args.tokens}
    own = sides(1, structure="off", min_new_tokens=args.tokens, **drawn)
    result["noise"] = measure(own, [prompts[:1]] * max(5, args.repeats), "noise")
    medians = [side["speedup"]["median"] for side in result["noise"]["sides"].values()]
    print(f"\nwhere no draft is right, auto takes {1 / statistics.median(medians[1:2]):.3f} times as long as off")
    finish(result, args.output)


if __name__ == "__main__":
    main()
