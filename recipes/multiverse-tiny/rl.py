"""Reinforcement learning in small: does a model that forks rarely learn to fork, and is it the reward that does it?

    python recipes/multiverse-tiny/rl.py --output runs/rl-tiny
    python recipes/multiverse-tiny/rl.py --output runs/rl-look --seeds 0 --steps 10 --problems 50     # a quick look

Fine-tunes the embedded model to fork rarely (``make_rare.py``, ``sft_rare.yaml``). Then trains it with ``grpo.yaml``,
once for each seed and each of two sets of rewards: "acceleration" pays for right answers, and more for parallel ones,
"right" for right answers alone. The start and each trained model are asked the same unseen problems, greedily. Writes
the table and the curves. What is finished is kept, and the same command goes on after a stop.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from paper import StepError, spread

from multiverse_hf import embedded_model
from multiverse_hf.errors import FAILURE, CommandError, ScriptParser
from multiverse_hf.evaluation.figures import make_figure
from multiverse_hf.outputs import check_output, write_output
from multiverse_hf.provenance import commit, hardware, versions

HERE = Path(__file__).parent
ARMS = {"acceleration": (["right", "acceleration"], ["1", "1"]), "right": (["right"], ["1"])}
CURVES = {"answers/parallelism": "# parallel", "rewards/right/mean": "right"}


def call(log: Path, *command: str) -> None:
    """Run a script, its output in a file."""
    with log.open("a") as file:
        done = subprocess.run([sys.executable, *command], stdout=file, stderr=file, env=os.environ, check=False)
    if done.returncode:
        raise StepError(f"{' '.join(command[:3])} failed with {done.returncode}; {log} says why")


def make_start(args: argparse.Namespace) -> Path:
    """Fine-tune the model that forks rarely; return its folder."""
    data, start = args.output / "data", args.output / "start"
    if not (data / "problems.jsonl").is_file():
        call(args.output / "data.log", str(HERE / "make_rare.py"), "--output", str(data))
    if not (start / "run.json").is_file():
        print(f"training the start, see {start}.log", flush=True)
        call(
            Path(f"{start}.log"), str(HERE.parent / "sft.py"), "--config", str(HERE / "sft_rare.yaml"),
            "--model_name_or_path", embedded_model(), "--dataset_name", str(data / "rows.jsonl"),
            "--output_dir", str(start), "--resume_from_checkpoint", "true",
        )  # fmt: skip
    return start


def train(start: Path, run: Path, arm: str, seed: int, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train with one set of rewards, or go on; return the log."""
    record = run / "run.json"
    if not record.is_file():
        print(f"seed {seed}, {arm}: training, see {run}.log", flush=True)
        rewards, weights = ARMS[arm]
        call(
            Path(f"{run}.log"), str(HERE.parent / "grpo.py"), "--config", str(HERE / "grpo.yaml"),
            "--model_name_or_path", str(start), "--dataset_name", str(args.output / "data/problems.jsonl"),
            "--rewards", *rewards, "--reward_weights", *weights, "--output_dir", str(run), "--seed", str(seed),
            "--max_steps", str(args.steps), "--learning_rate", str(args.learning_rate), "--logging_steps", "1",
            "--per_device_train_batch_size", "32", "--report_to", "none", "--resume_from_checkpoint", "true",
        )  # fmt: skip
    return [entry for entry in json.loads(record.read_bytes())["log"] if "answers/parallelism" in entry]


def evaluate(model: Path, args: argparse.Namespace) -> dict[str, float]:
    """Ask a model unseen problems, and return the results."""
    output = Path(f"{model}-evaluation.json")
    if not output.is_file():
        print(f"asking {model.name}", flush=True)
        call(
            args.output / "evaluation.log", str(HERE / "evaluate.py"), "--model", str(model), "--output", str(output),
            "--problems", str(args.problems), "--kinds", "flat", "--max-chains", "4", "--max-ops", "3",
            "--max-new-tokens", "1024",
        )  # fmt: skip
    return json.loads(output.read_bytes())["results"]["flat"]


def markdown(rows: dict[str, dict[str, dict[str, float]]]) -> str:
    """Write the table."""
    lines = ["| | right, % | # parallel | length | tokens |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        cells = [f"{row['accuracy']['mean']:.1f} ± {row['accuracy']['sd']:.1f}"]
        cells += [f"{row['parallelism']['mean']:.2f} ± {row['parallelism']['sd']:.2f}"]
        cells += [f"{row[column]['mean']:.0f} ± {row[column]['sd']:.0f}" for column in ("length", "tokens")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(path: Path, curves: dict[str, list[list[dict[str, float]]]]) -> None:
    """Draw each metric over the steps, a line for each seed."""
    figure, every = make_figure(len(CURVES), width=9.0)
    for axes, (metric, label) in zip(every, CURVES.items(), strict=True):
        for color, (arm, runs) in zip(("C0", "C1"), curves.items(), strict=False):
            for number, log in enumerate(runs):
                steps, values = [entry["step"] for entry in log], [entry[metric] for entry in log]
                axes.plot(steps, values, color=color, alpha=0.8, label=arm if not number else None)
        axes.set(xlabel="step", ylabel=label)
    every[0].legend(title="rewards")
    figure.savefig(path)


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/rl-tiny"), help="folder (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="default: all")
    parser.add_argument("--steps", type=int, default=60, help="of each run (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--problems", type=int, default=300, help="unseen problems (default: %(default)s)")
    args = parser.parse_args()
    for name in ("steps", "problems"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    settings = {name: getattr(args, name) for name in ("steps", "learning_rate", "problems")}
    try:
        check_output(args.output, is_folder=True)
        begun = args.output / "settings.json"
        if begun.is_file() and (before := json.loads(begun.read_bytes())) != settings:
            raise CommandError(f"{args.output} was begun with {before}; use the same, or another --output")
        write_output(begun, json.dumps(settings) + "\n")
        start = make_start(args)
        results = {"start": [evaluate(start, args)]}
        curves: dict[str, list[list[dict[str, float]]]] = {}
        for seed in args.seeds:
            for arm in args.arms:
                run = args.output / f"{arm}-{seed}"
                curves.setdefault(arm, []).append(train(start, run, arm, seed, args))
                results.setdefault(arm, []).append(evaluate(run, args))
    except CommandError as err:
        parser.error(str(err))
    except StepError as err:
        parser.exit(FAILURE, f"error: {err}\n")
    rows = {
        name: {"accuracy": spread([each["accuracy"] for each in found], 100)}
        | {column: spread([each[column] for each in found]) for column in ("parallelism", "length", "tokens")}
        for name, found in results.items()
    }
    made = {"settings": settings, "seeds": args.seeds, "commit": commit(), "versions": versions(), **hardware()}
    kept = ("step", *CURVES)
    log = {arm: [[{key: entry[key] for key in kept} for entry in run] for run in runs] for arm, runs in curves.items()}
    write_output(args.output / "rl.json", json.dumps(made | {"rows": rows, "curves": log}, indent=1) + "\n")
    write_output(args.output / "rl.md", markdown(rows))
    draw(args.output / "rl.png", curves)
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
