"""The paper's central table in small: base, autoregressive twin, Multiverse-zero and Multiverse, over several seeds.

    python recipes/multiverse-tiny/paper.py --output runs/paper-tiny
    python recipes/multiverse-tiny/paper.py --output runs/paper-tiny --seeds 0 --num-rows 3000     # a quick look

Each seed draws weights, rows and their order anew and trains two models on the same problems: one on parallel
documents (with 15 % sequential ones under the sequential suffix), one on all of them in sequential form. Each is then
asked unseen problems, greedily. "zero" is the parallel model under the sequential suffix, "base" the random weights
both began with. Two models train at once, a core each. Finished models are kept, and the same command continues.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from multiverse_hf.errors import FAILURE, CommandError, ScriptParser
from multiverse_hf.outputs import check_output, write_output

HERE = Path(__file__).parent
KINDS = ("single", "flat", "nested")
# name in the table: (which model, suffix of its prompts)
ROWS = {
    "base, random weights": ("base", "parallel"),
    "autoregressive twin": ("autoregressive", "sequential"),
    "Multiverse-zero (sequential suffix)": ("parallel", "sequential"),
    "Multiverse": ("parallel", "parallel"),
}


class StepError(Exception):
    """A failed step, with its log."""


def call(log: Path, *command: str) -> None:
    """Run a command on one core, its output in a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=file, env=environment, check=False)
    if done.returncode:
        raise StepError(f"{' '.join(command[:3])} failed with {done.returncode}; {log} says why")


def train(folder: Path, seed: int, name: str, args: argparse.Namespace) -> None:
    """Train one model of a seed, or resume its training."""
    run = folder / name
    if (run / "run.json").is_file():
        return
    print(f"seed {seed}: training the {name} model, see {run}.log", flush=True)
    config = "sft.yaml" if name == "parallel" else "sft_autoregressive.yaml"
    resume = ["--resume_from_checkpoint", "true"] if any(run.glob("checkpoint-*/trainer_state.json")) else []
    call(
        Path(f"{run}.log"), "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu",
        "--mixed_precision", "no", "--num_cpu_threads_per_process", "1", str(HERE.parent / "sft.py"),
        "--config", str(HERE / config), "--model_name_or_path", str(folder / "base"), "--output_dir", str(run),
        "--seed", str(seed), "--rows_seed", str(seed + 1), "--num_rows", str(args.num_rows),
        "--max_chains", str(args.max_chains), "--max_ops", str(args.max_ops), *resume,
    )  # fmt: skip


def evaluate(folder: Path, seed: int, row: str, args: argparse.Namespace) -> dict:
    """Ask one model of a seed, and return the report."""
    name, suffix = ROWS[row]
    output = folder / f"evaluation-{name}-{suffix}.json"
    if not output.is_file():
        print(f"seed {seed}: asking {row}", flush=True)
        # a base that knows no end runs to the limit every time: a few problems tell as much
        problems = args.problems if name != "base" else min(args.problems, 20)
        call(
            folder / "evaluation.log", str(HERE / "evaluate.py"), "--model", str(folder / name), "--suffix", suffix,
            "--problems", str(problems), "--max-chains", str(args.max_chains), "--max-ops", str(args.max_ops),
            "--output", str(output), "--max-new-tokens", "64" if name == "base" else "1536",
        )  # fmt: skip
    return json.loads(output.read_bytes())


def run(args: argparse.Namespace, pool: ThreadPoolExecutor) -> dict[int, dict[str, dict]]:
    """Train and evaluate the models of all seeds; return the reports by seed and row of the table."""
    folders = {seed: args.output / f"seed-{seed}" for seed in args.seeds}
    for seed, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "base/config.json").is_file():
            call(
                folder / "base.log", str(HERE / "make_base.py"), "--output", str(folder / "base"), "--seed", str(seed)
            )
    models = [(folders[seed], seed, name, args) for seed in args.seeds for name in ("parallel", "autoregressive")]
    list(pool.map(lambda model: train(*model), models))
    asked = [(folders[seed], seed, row, args) for seed in args.seeds for row in ROWS]
    reports = pool.map(lambda question: evaluate(*question), asked)
    return {seed: {row: next(reports) for row in ROWS} for seed in args.seeds}


def spread(values: list[float], scale: float = 1) -> dict[str, float]:
    """Return mean and standard deviation of a sample; 0 for one value."""
    values = [scale * value for value in values]
    return {
        "mean": round(statistics.mean(values), 3),
        "sd": round(statistics.stdev(values), 3) if len(values) > 1 else 0.0,
        "values": values,
    }


def table(results: dict[int, dict[str, dict]]) -> dict[str, dict]:
    """Return results over seeds: accuracy in percent, over all problems and by kind, # parallel and length."""
    rows = {}
    for row in ROWS:
        reports = [results[seed][row]["results"] for seed in results]
        every = [
            sum(report[kind]["accuracy"] * report[kind]["problems"] for kind in KINDS)
            / sum(report[kind]["problems"] for kind in KINDS)
            for report in reports
        ]
        rows[row] = {"accuracy": spread(every, 100)}
        rows[row] |= {kind: spread([report[kind]["accuracy"] for report in reports], 100) for kind in KINDS}
        for name in ("parallelism", "length", "tokens"):
            of_blocks = [[report[kind][name] for kind in ("flat", "nested")] for report in reports]
            rows[row][name] = spread([statistics.mean(values) for values in of_blocks])
    return rows


def markdown(rows: dict[str, dict]) -> str:
    """Write the table."""

    def cell(value: dict[str, float]) -> str:
        return f"{value['mean']:.1f} ± {value['sd']:.1f}"

    lines = ["| | all, % right | single | flat | nested | # parallel | length |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [cell(row[column]) for column in ("accuracy", *KINDS)]
        width = row["parallelism"]
        cells += [f"{width['mean']:.2f} ± {width['sd']:.2f}", cell(row["length"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: dict[str, dict]) -> None:
    """Draw accuracy against # parallel, a point for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for marker, (name, row) in zip("xs^o", rows.items(), strict=True):  # points of different rows may coincide
        axes.plot(row["parallelism"]["values"], row["accuracy"]["values"], marker, label=name, fillstyle="none")
    axes.set(xlabel="# parallel (flat and nested problems)", ylabel="percent right (all problems)", ylim=(-3, 103))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/paper-tiny"), help="folder (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--num-rows", type=int, default=36_000, help="rows each model trains on (default: 36000)")
    parser.add_argument("--max-chains", type=int, default=4, help="of a problem, 4 to 8 (default: 4)")
    parser.add_argument("--max-ops", type=int, default=3, help="of a chain, 2 to 8 (default: 3)")
    parser.add_argument("--problems", type=int, default=300, help="unseen problems of each kind (default: 300)")
    args = parser.parse_args()
    for name, low, high in (("max_chains", 4, 8), ("max_ops", 2, 8), ("num_rows", 1, None), ("problems", 1, None)):
        value = getattr(args, name)
        if value < low or (high is not None and value > high):
            parser.error(f"--{name.replace('_', '-')} must be at least {low}{f', at most {high}' if high else ''}")
    settings = {name: getattr(args, name) for name in ("num_rows", "max_chains", "max_ops", "problems")}
    try:
        check_output(args.output, is_folder=True)
        begun = args.output / "settings.json"
        if begun.is_file() and (before := json.loads(begun.read_bytes())) != settings:
            raise CommandError(f"{args.output} was begun with {before}; use the same, or another --output")
        write_output(begun, json.dumps(settings) + "\n")
    except CommandError as err:
        parser.error(str(err))
    try:
        with ThreadPoolExecutor(2) as pool:
            results = run(args, pool)
    except StepError as err:
        parser.exit(FAILURE, f"error: {err}\n")
    rows = table(results)
    reports = [report for of_seed in results.values() for report in of_seed.values()]
    made_with = {
        "commits": sorted({str(report["commit"]) for report in reports}),
        "versions": [dict(each) for each in sorted({tuple(report["versions"].items()) for report in reports})],
    }
    table_of = {"settings": settings, "seeds": args.seeds, "evaluated_with": made_with, "rows": rows}
    write_output(args.output / "table.json", json.dumps(table_of, indent=1) + "\n")
    write_output(args.output / "table.md", markdown(rows))
    draw(args.output / "table.png", rows)
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
