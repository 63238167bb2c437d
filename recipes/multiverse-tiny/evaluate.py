"""Measure a checkpoint on unseen chains problems: accuracy, # parallel, forks, well-formedness.

    python recipes/multiverse-tiny/evaluate.py --model runs/multiverse-tiny/parallel --output evaluation.json
    python recipes/multiverse-tiny/evaluate.py --model runs/multiverse-tiny/autoregressive --suffix sequential

Greedy and guided, unless told otherwise. Problems of the run's own training rows (``run.json`` beside the model) are
left out. ``multiverse eval --task mv:chains`` asks a fixed set of 300, with intervals and resumable; this asks many
more, of each kind, of the sizes that a small model was trained on, and writes the records beside the embedded
checkpoints.
"""

import json
import time
from itertools import islice
from pathlib import Path

from multiverse_hf.checkpoints import Attention, Dtype, load_model, open_checkpoint
from multiverse_hf.data.chains import MAX_CHAINS, MAX_OPS, ChainsProblem, Kind, is_correct
from multiverse_hf.documents import is_well_formed
from multiverse_hf.errors import FAILURE, CommandError, ScriptParser, one_line
from multiverse_hf.evaluation.chains import training_problems, unseen_chains
from multiverse_hf.modeling.tags import encode_prompt
from multiverse_hf.outputs import check_output, json_text, write_output
from multiverse_hf.provenance import commit, versions


def answer(model, tokenizer, prompts: list[str], **options) -> tuple[list[str], list]:
    """Answer a batch of prompts; return the documents and their stats."""
    rows = [encode_prompt(tokenizer, prompt, model.tags.names) for prompt in prompts]
    batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
    output = model.generate(**batch, return_dict_in_generate=True, do_sample=False, **options)
    texts = tokenizer.batch_decode(output.sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts, output.stats


def measure(model, tokenizer, problems: list[ChainsProblem], suffix: str, batch_size: int, **options) -> dict:
    """Answer problems and sum up."""
    begin, rows = time.perf_counter(), []
    for at in range(0, len(problems), batch_size):
        batch = problems[at : at + batch_size]
        prompts = [problem.prompt(parallel=suffix == "parallel") for problem in batch]
        for problem, text, stats in zip(batch, *answer(model, tokenizer, prompts, **options), strict=True):
            rows.append((problem, is_correct(problem, text), is_well_formed(text), stats))
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


def main() -> None:
    parser = ScriptParser(description=__doc__)
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
        "versions": versions(),
        "commit": commit(),
        "training_problems_left_out": len(seen),
        "results": {},
    }
    for kind in args.kinds:
        problems = list(
            islice(unseen_chains(Kind(kind), args.seed, seen, args.max_chains, args.max_ops), args.problems)
        )
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
        write_output(args.output, json_text(report, indent=1))


if __name__ == "__main__":
    main()
