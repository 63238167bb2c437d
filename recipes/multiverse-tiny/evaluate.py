"""Measure a checkpoint on unseen chains problems: accuracy, # parallel, forks, well-formedness.

    python recipes/multiverse-tiny/evaluate.py --model runs/multiverse-tiny/parallel --output evaluation.json
    python recipes/multiverse-tiny/evaluate.py --model runs/multiverse-tiny/sequential --suffix sequential

Greedy and guided, unless told otherwise. Problems of the run's own training rows (``run.json`` beside the model) are
left out.
"""

import argparse
import json
import platform
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

from multiverse_hf.checkpoints import (
    FAILURE,
    Attention,
    CommandError,
    Dtype,
    check_output,
    load_model,
    one_line,
    open_checkpoint,
    write_output,
)
from multiverse_hf.data.chains import MAX_CHAINS, MAX_OPS, Kind, Problem, is_correct, sample_problem
from multiverse_hf.data.mixtures import ChainsMixture
from multiverse_hf.documents import DocumentError, parse_document
from multiverse_hf.modeling.tags import encode_prompt


def training_problems(model: str) -> set[str]:
    """Give the problems a run was trained on, from its ``run.json``; none if there is no such file.

    Raises:
        CommandError: if the file is not what sft.py writes.
    """
    record = Path(model, "run.json")
    if not record.is_file():
        return set()
    try:
        data = json.loads(record.read_bytes())["data"]
        names = {field.name for field in fields(ChainsMixture)} & data.keys()
        mixture = ChainsMixture(seed=data["rows_seed"], **{name: data[name] for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CommandError(f"{record} names no training rows ({err!r}); move it away if it is not of sft.py") from err
    return {str(row.problem) for row in mixture}


def unseen(
    kind: Kind, count: int, seed: int, seen: set[str], max_chains: int = MAX_CHAINS, max_ops: int = MAX_OPS
) -> Iterator[Problem]:
    """Draw problems that are not among those seen, each once."""
    rng, drawn = random.Random(f"{seed}-{kind.value}"), set(seen)
    while count:
        problem = sample_problem(rng, kind, max_ops=max_ops)
        if len(problem.chains) <= max_chains and str(problem) not in drawn:
            drawn.add(str(problem))
            count -= 1
            yield problem


def answer(model, tokenizer, prompts: list[str], **options) -> tuple[list[str], list]:
    """Answer a batch of prompts; give the documents and their stats."""
    rows = [encode_prompt(tokenizer, prompt, model.tags.names) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    output = model.generate(**batch, return_dict_in_generate=True, do_sample=False, **options)
    texts = tokenizer.batch_decode(output.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, output.stats


def measure(model, tokenizer, problems: list[Problem], suffix: str, batch_size: int, **options) -> dict:
    """Answer problems and sum up."""
    begin, rows = time.perf_counter(), []
    for at in range(0, len(problems), batch_size):
        batch = problems[at : at + batch_size]
        prompts = [problem.prompt(parallel=suffix == "parallel") for problem in batch]
        for problem, text, stats in zip(batch, *answer(model, tokenizer, prompts, **options), strict=True):
            try:
                parse_document(text)
                parses = True
            except DocumentError:
                parses = False
            rows.append((problem, is_correct(problem, text), parses, stats))
        print(f"\r{sum(r[1] for r in rows)}/{len(rows)} right", end="", flush=True)
    print("\r", end="")

    def mean(values: list[float]) -> float | None:
        return round(sum(values) / len(values), 4) if values else None

    many = [s for p, _, _, s in rows if len(p.chains) >= 6]
    return {
        "problems": len(rows),
        "accuracy": mean([float(right) for _, right, _, _ in rows]),
        "well_formed": mean([float(parses) for _, _, parses, _ in rows]),
        "share_that_forks": mean([float(s.num_forks > 0) for *_, s in rows]),
        "parallelism": mean([s.parallelism for *_, s in rows]),
        "parallelism_6_or_more_chains": mean([s.parallelism for s in many]),
        "tokens": mean([s.num_tokens for *_, s in rows]),
        "length": mean([s.length for *_, s in rows]),
        "steps": mean([s.num_steps for *_, s in rows]),
        "accuracy_by_chains": {
            str(n): mean([float(right) for p, right, _, _ in rows if len(p.chains) == n])
            for n in sorted({len(p.chains) for p, *_ in rows})
        },
        "seconds": round(time.perf_counter() - begin, 1),
    }


def commit() -> str | None:
    """Give the commit measured; None outside a checkout."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--problems", type=int, default=500, help="of each kind")
    parser.add_argument("--kinds", nargs="+", default=[kind.value for kind in Kind], choices=[k.value for k in Kind])
    parser.add_argument("--suffix", default="parallel", choices=["parallel", "sequential"])
    parser.add_argument("--structure", default="guided", choices=["guided", "lenient", "off"])
    parser.add_argument("--max-new-tokens", type=int, default=2560)
    parser.add_argument("--max-chains", type=int, default=MAX_CHAINS, help="of a problem, 4 to 8 (default: 8)")
    parser.add_argument("--max-ops", type=int, default=MAX_OPS, help="of a chain, 1 to 8 (default: 8)")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    for name in ("problems", "batch_size", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name, low, high in (("max_chains", 4, MAX_CHAINS), ("max_ops", 1, MAX_OPS)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be from {low} to {high}, got {getattr(args, name)}")
    try:
        if args.output:
            check_output(args.output)
        seen = training_problems(args.model)
        checkpoint = open_checkpoint(args.model)
        tokenizer = checkpoint.tokenizer
        if tokenizer.pad_token is None:
            raise CommandError(f"{args.model} has no padding token; name one in its tokenizer_config.json")
        model = load_model(checkpoint, Dtype(args.dtype), Attention.SDPA, device="cpu", threads=None)
    except CommandError as err:
        parser.error(str(err))
    report = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "output"},
        "decoding": "greedy",
        "versions": {name: version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "commit": commit(),
        "training_problems_left_out": len(seen),
        "results": {},
    }
    for kind in args.kinds:
        problems = list(unseen(Kind(kind), args.problems, args.seed, seen, args.max_chains, args.max_ops))
        try:
            result = measure(
                model, tokenizer, problems, args.suffix, args.batch_size,
                structure=args.structure, max_new_tokens=args.max_new_tokens,
            )  # fmt: skip
        except ValueError as err:  # a generation config that cannot branch, weights that give NaN
            parser.exit(FAILURE, f"error: {args.model} cannot answer: {one_line(err)}\n")
        report["results"][kind] = result
        print(kind, json.dumps(result))
    if args.output:
        write_output(args.output, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
