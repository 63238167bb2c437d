"""Wall clock of a parallel model against its autoregressive twin, on the same questions.

Greedy, three sides that take turns on each batch of questions:

- generate: ``model.generate`` of the parallel model, with the parallel suffix.
- engine: ``MultiverseEngine`` of the same model and prompts.
- transformers: ``generate`` of the twin by plain transformers, with the sequential suffix.

Prints for each side and batch size the seconds per answer, tokens and right answers, and how many times faster the
parallel model answers than its twin. The questions are rows of ``heldout.jsonl`` of recipes/smollm2-135m/make_data.py.

    python benchmarks/twin_wallclock.py --model runs/smollm2-135m/multiverse \
        --twin runs/smollm2-135m/autoregressive --questions runs/smollm2-135m/data/heldout.jsonl
    python benchmarks/twin_wallclock.py ... --families leg_counting gcd --batch 1 --problems 4 --dtype float32
"""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from report import announce, count, environment, finish, make_parser, show, show_environment, shown, spread, store
from transformers import AutoModelForCausalLM, AutoTokenizer

from multiverse_hf import MultiverseEngine
from multiverse_hf.checkpoints import Attention, Dtype, load_model, open_checkpoint
from multiverse_hf.data.records import read_answer
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError
from multiverse_hf.modeling.tags import encode_prompt
from multiverse_hf.modeling.threads import set_threads

SUFFIXES = {"generate": Suffix.PARALLEL, "engine": Suffix.PARALLEL, "transformers": Suffix.SEQUENTIAL}
Answers = list[list[int]]


def read_questions(file: Path, families: list[str] | None, problems: int) -> list[dict[str, str]]:
    """Return the questions of the families in turns, so that each batch has several.

    Raises:
        CommandError: if the file cannot be read, or lacks a family.
    """
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found = list(dict.fromkeys(row["family"] for row in rows))
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise CommandError(f"cannot read {file} ({err}); recipes/smollm2-135m/make_data.py writes it") from err
    if unknown := sorted(set(families or found) - set(found)):
        raise CommandError(f"{file} has no family {unknown[0]}; it has {', '.join(found)}")
    each = [[row for row in rows if row["family"] == name][:problems] for name in families or found]
    return [row for turn in itertools.zip_longest(*each) for row in turn if row is not None]


def pad_left(prompts: Answers, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask of prompts, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def make_sides(args: Any) -> tuple[dict[str, Callable[[Answers], Answers]], dict[str, Any]]:
    """Load both models; return the sides and their tokenizers."""
    checkpoint = open_checkpoint(str(args.model))
    model = load_model(checkpoint, Dtype(args.dtype), Attention.SDPA, args.device, None)
    twin_tokenizer = AutoTokenizer.from_pretrained(args.twin)
    twin = AutoModelForCausalLM.from_pretrained(args.twin, dtype=getattr(torch, args.dtype)).eval().to(args.device)
    engine = MultiverseEngine(model, checkpoint.tokenizer, max_num_seqs=max(args.batch))
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens}

    def strip(output: torch.Tensor, width: int, pad: int) -> Answers:
        return [[token for token in row if token != pad] for row in output[:, width:].tolist()]

    def by_generate(prompts: Answers) -> Answers:
        pad = checkpoint.tokenizer.pad_token_id
        ids, mask = (each.to(args.device) for each in pad_left(prompts, pad))
        return strip(model.generate(ids, attention_mask=mask, **options), ids.shape[1], pad)

    def by_engine(prompts: Answers) -> Answers:
        return [list(result.ids) for result in engine.generate(prompts, **options)]

    def by_transformers(prompts: Answers) -> Answers:
        pad = twin_tokenizer.pad_token_id
        ids, mask = (each.to(args.device) for each in pad_left(prompts, pad))
        return strip(twin.generate(ids, attention_mask=mask, pad_token_id=pad, **options), ids.shape[1], pad)

    sides = {"generate": by_generate, "engine": by_engine, "transformers": by_transformers}
    tokenizers = dict.fromkeys(("generate", "engine"), checkpoint.tokenizer) | {"transformers": twin_tokenizer}
    return sides, tokenizers


def measure(side: Callable[[Answers], Answers], suffix: Suffix, rows: list[dict[str, str]], tokenizer: Any) -> dict:
    """Time one side on one batch of questions."""
    prompts = [encode_prompt(tokenizer, suffix.end(row["question"].strip())) for row in rows]
    begin = time.perf_counter()
    answers = side(prompts)
    seconds = time.perf_counter() - begin
    said = [read_answer(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    right = mean(text == row["answer"].rstrip(".") for text, row in zip(said, rows, strict=True))
    return {"seconds": seconds / len(rows), "tokens": mean(map(len, answers)), "right": right}


def summarize(runs: dict[str, list[dict]]) -> dict[str, Any]:
    """Return each side's figures, and how many times faster the parallel ones are than the twin."""
    result: dict[str, Any] = {"sides": {}, "speedup": {}}
    for name, side in runs.items():
        result["sides"][name] = {key: spread([run[key] for run in side]) for key in ("seconds", "tokens")}
        result["sides"][name]["right"] = round(mean(run["right"] for run in side), 4)
    for name in ("generate", "engine"):
        pairs = list(zip(runs["transformers"], runs[name], strict=True))
        result["speedup"][name] = spread([slow["seconds"] / fast["seconds"] for slow, fast in pairs])
        total = sum(slow["seconds"] for slow, _ in pairs) / sum(fast["seconds"] for _, fast in pairs)
        result["speedup"][name]["total"] = round(total, 4)
    return result


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--model", type=Path, required=True, help="folder of the parallel model")
    parser.add_argument("--twin", type=Path, required=True, help="folder of the autoregressive model")
    parser.add_argument("--questions", type=Path, required=True, help="heldout.jsonl of make_data.py")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="only these families")
    parser.add_argument("--problems", type=count, default=8, help="questions of each family (default: %(default)s)")
    parser.add_argument("--batch", type=count, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=count, default=1024, help="bound on an answer (default: %(default)s)")
    args = parser.parse_args()
    if args.threads is not None:
        set_threads(args.threads)
    try:
        rows = read_questions(args.questions, args.families, args.problems)
        sides, tokenizers = make_sides(args)
    except CommandError as err:
        parser.error(str(err))
    result = {
        "benchmark": "twin_wallclock",
        **environment(torch.device(args.device)),
        "dtype": args.dtype,
        "batch": {},
    }
    show_environment(result)
    first = {name: measure(side, SUFFIXES[name], rows[:1], tokenizers[name]) for name, side in sides.items()}
    announce(sum(each["seconds"] for each in first.values()) * len(rows) * len(args.batch) * args.repeats)
    for size in args.batch:
        runs: dict[str, list[dict]] = {name: [] for name in sides}
        names = list(sides)
        batches = [rows[at : at + size] for at in range(0, len(rows) - len(rows) % size, size)] * args.repeats
        for batch in shown(batches, "batch"):
            for name in names:
                runs[name].append(measure(sides[name], SUFFIXES[name], batch, tokenizers[name]))
            names = names[1:] + names[:1]  # another side begins, so that none profits from its place
        result["batch"][str(size)] = {"answers": size * len(batches), **summarize(runs)}
        store(result, args.output)
        print(f"\nbatch {size}{'':20}{'seconds per answer':30}{'tokens':>8}{'right':>8}   faster than the twin by")
        for name, side in result["batch"][str(size)]["sides"].items():
            speedup = result["batch"][str(size)]["speedup"]
            ratio = show(speedup[name], "x") if name in speedup else ""
            seconds, tokens = show(side["seconds"], " s"), side["tokens"]["median"]
            print(f"{name:28}{seconds:30}{tokens:8.0f}{side['right']:8.3f}   {ratio}")
    finish(result, args.output)


if __name__ == "__main__":
    main()
