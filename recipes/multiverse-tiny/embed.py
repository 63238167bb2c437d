"""Put a finished run into the package: weights, tokenizer, and the records that belong to them.

python recipes/multiverse-tiny/embed.py --run runs/multiverse-tiny/parallel --name multiverse-tiny
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from transformers import GenerationConfig

from multiverse_hf.errors import CommandError, ScriptParser, one_line
from multiverse_hf.outputs import check_output, output_folder

ASSETS = Path(__file__).parents[2] / "src/multiverse_hf/assets"
MODEL_CARDS = Path(__file__).parents[2] / "model_cards"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
COLUMNS = ("step", "epoch", "num_tokens", "learning_rate", "loss", "grad_norm", "mean_token_accuracy")


def write_log(path: Path, history: list[dict[str, float]]) -> None:
    """Write what the trainer logged as a table, with six digits: two checkpoints and their records fit 15 MB."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows([f"{record[name]:.6g}" for name in COLUMNS] for record in history if "loss" in record)


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's output folder")
    parser.add_argument("--name", required=True, help="of the checkpoint in the package")
    args = parser.parse_args()

    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.name):
        parser.error(f"--name is one plain word such as multiverse-tiny, got {args.name!r}")
    checkpoints = sorted(
        args.run.glob("checkpoint-[0-9]*/trainer_state.json"), key=lambda path: int(path.parts[-2][11:])
    )
    if not checkpoints or not (args.run / "run.json").is_file():
        parser.error(f"{args.run} holds no finished run; train it first (recipes/multiverse-tiny/README.md)")
    evaluations = sorted(args.run.glob("evaluation*.json"))
    if not evaluations:
        parser.error(f"{args.run} holds no evaluation*.json; run evaluate.py --output {args.run}/evaluation.json")
    facts = MODEL_CARDS / f"{args.name}.yaml"
    if not facts.is_file():
        parser.error(f"no file {facts} with what the card of {args.name} should say; write one like its neighbours")
    missing = [name for name in FILES if not (args.run / name).is_file()]
    if missing:
        parser.error(f"{args.run} lacks {', '.join(missing)}; train it again")
    target = ASSETS / args.name
    try:
        check_output(target, is_folder=True)
        history = json.loads(checkpoints[-1].read_bytes())["log_history"]
        generation = GenerationConfig.from_pretrained(args.run)
    except CommandError as err:
        parser.error(str(err))
    except (OSError, ValueError, KeyError, TypeError) as err:
        parser.error(f"{args.run} has damaged records ({one_line(err)}); train it again")
    generation.max_new_tokens = 2560
    generation._from_model_config = False
    with output_folder(target) as folder:
        for file in [*(args.run / name for name in FILES), args.run / "run.json", *evaluations]:
            shutil.copyfile(file, folder / file.name)
        config = json.loads((folder / "config.json").read_bytes())
        config.pop("auto_map", None)  # the package has the code already
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_log(folder / "train.csv", history)
        generation.save_pretrained(folder)
        make = [sys.executable, MODEL_CARDS / "make_card.py", folder, "--facts", facts]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
