"""Write training rows and held-out problems of families whose documents a program writes.

python recipes/smollm2-135m/make_data.py --output runs/smollm2-135m/data --chats recipes/smollm2-135m/chats.jsonl
python recipes/smollm2-135m/make_data.py --output runs/small --size 60 --heldout 5
python recipes/smollm2-135m/make_data.py --output runs/mine --families my-families

OUTPUT gets multiverse.jsonl and autoregressive.jsonl (the same problems in the same order), heldout.jsonl, and
tasks.txt: for each family of reasoning-gym, the --task of `multiverse eval` that asks the held-out problems. Both
files of rows also get the --chats, which keep a training from forgetting what the base can do.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from multiverse_hf.data.families import ProblemFamily, Solution, load_families
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError, ScriptParser, install_line
from multiverse_hf.outputs import check_output, output_folder

HELDOUT_SEED = 1_000_000  # where `multiverse eval` begins too; training seeds stay below
TRIES = 4  # items drawn for each row: some repeat, or do not suit


@dataclass(frozen=True)
class Made:
    """An item with its checked solution."""

    family: ProblemFamily
    item: dict[str, Any]
    solution: Solution

    def row(self, suffix: Suffix) -> dict[str, Any]:
        """Return the training row in the form that the suffix asks for."""
        document = self.solution.document()
        return {
            "family": self.family.name,
            "prompt": [{"role": "user", "content": suffix.end(self.item["question"].strip())}],
            "document": document.render() if suffix is Suffix.PARALLEL else document.sequential(),
            "answer": self.solution.answer,
        }


def solve_items(family: ProblemFamily, seed: int, count: int, taken: set[str]) -> list[Made]:
    """Return ``count`` solved and checked items whose questions are not in ``taken``, and add them to it.

    Raises:
        CommandError: if a solution is wrong, or too few items are new.
    """
    made: list[Made] = []
    for item in family.items(seed, count * TRIES + 100):
        if len(made) == count:
            break
        question = item["question"].strip()
        solution = None if question in taken else family.solve(item)
        if solution is None:
            continue
        if faults := family.find_faults(item, solution):
            raise CommandError(f"family {family.name}: {faults[0]}; the question is {question!r:.200}")
        taken.add(question)
        made.append(Made(family, item, solution))
    if len(made) < count:
        raise CommandError(f"family {family.name} has {len(made)} new items, {count} are needed; widen its options")
    return made


def find_task(family: ProblemFamily, size: int) -> str | None:
    """Return the --task of ``multiverse eval`` for the held-out problems, None for a family of one's own items."""
    if family.make:
        return None
    options = {"size": size, "seed": HELDOUT_SEED} | family.options
    return ",".join([f"rg:{family.name}", *(f"{key}={json.dumps(value)}" for key, value in options.items())])


def read_chats(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of chats.

    Raises:
        CommandError: if a line is not a chat.
    """
    chats = []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
            chats.append({"family": "chat", "prompt": row["prompt"], "document": row["document"]})
        except (ValueError, KeyError, TypeError) as err:
            raise CommandError(f"{file}, line {number}: no prompt and document; see make_chats.py") from err
    return chats


def describe(rows: list[Made], heldout: int, tokenizer: Any) -> Table:
    """Return the table of families: rows, median length, # parallel, blocks and checks."""
    from multiverse_hf.data.measures import Ruler
    from multiverse_hf.modeling.tags import TagSet

    ruler = None
    if tokenizer is not None:
        TagSet.add_to(tokenizer)
        ruler = Ruler(tokenizer, TagSet.from_tokenizer(tokenizer), "")
    unit = "tokens" if ruler else "words"
    table = Table("family", "rows", "held out", f"median {unit}", "# parallel", "with a block", "nested", "checks")
    for name in dict.fromkeys(made.family.name for made in rows):
        documents = [made.solution.document() for made in rows if made.family.name == name]
        measures = [ruler.measure(document) for document in documents] if ruler else []
        lengths = [each.num_tokens for each in measures] or [len(each.render().split()) for each in documents]
        parallel = f"{sum(each.parallelism for each in measures) / len(measures):.2f}" if measures else "-"
        depths = [document.depth for document in documents]
        counts = [len(documents), heldout, sorted(lengths)[len(lengths) // 2], parallel]
        counts += [sum(depth > 0 for depth in depths), sum(depth > 1 for depth in depths), "all pass"]
        table.add_row(name, *map(str, counts))
    return table


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=1000, help="training rows in all (default: 1000)")
    parser.add_argument("--heldout", type=int, default=100, help="held-out problems of each family (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help=f"first seed, below {HELDOUT_SEED} (default: 0)")
    parser.add_argument("--families", type=Path, default=Path(__file__).parent / "families", help="folder of families")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these families of the folder")
    parser.add_argument("--chats", type=Path, help="chats to spread over the rows, as make_chats.py writes them")
    parser.add_argument("--tokenizer", help="folder or repository; the table then counts tokens, not words")
    args = parser.parse_args()
    try:
        families = load_families(args.families)
    except ValueError as err:
        missing = "No module named 'reasoning_gym" in str(err)
        parser.error(f"reasoning-gym is not installed; {install_line('tasks')}" if missing else str(err))
    for name in args.only or []:
        if name not in families:
            parser.error(f"--only: no family {name!r} in {args.families}; it has {', '.join(families)}")
    chosen = [family for name, family in families.items() if args.only is None or name in args.only]
    if args.size < len(chosen):
        parser.error(f"--size must be at least {len(chosen)}, one row of each family; got {args.size}")
    if args.heldout < 1:
        parser.error(f"--heldout must be at least 1, got {args.heldout}")
    last = HELDOUT_SEED - TRIES * args.size - 100
    if not 0 <= args.seed <= last:
        parser.error(f"--seed must be from 0 to {last}, so that training stays below the held-out seeds")
    console = Console(stderr=True)
    tokenizer = None
    try:
        check_output(args.output, is_folder=True)
        if args.tokenizer:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        rows: list[Made] = []
        heldout: list[Made] = []
        chats = read_chats(args.chats) if args.chats else []
        for number, family in enumerate(track(chosen, "making documents", console=console)):
            taken: set[str] = set()
            heldout += solve_items(family, HELDOUT_SEED, args.heldout, taken)
            share = args.size // len(chosen) + (number < args.size % len(chosen))
            rows += solve_items(family, args.seed, share, taken)
    except ModuleNotFoundError as err:
        parser.error(f"{err}; {install_line('tasks')}")
    except (CommandError, OSError, ValueError) as err:  # a tokenizer that cannot be read raises the last
        parser.error(" ".join(str(err).split()))
    tasks = [task for task in (find_task(family, args.heldout) for family in chosen) if task]
    questions = [
        {"family": made.family.name, "question": made.item["question"], "answer": made.item["answer"]}
        for made in heldout
    ]
    files = {
        "multiverse.jsonl": [*(made.row(Suffix.PARALLEL) for made in rows), *chats],
        "autoregressive.jsonl": [*(made.row(Suffix.SEQUENTIAL) for made in rows), *chats],
        "heldout.jsonl": questions,
    }
    with output_folder(args.output) as folder:
        for name, values in files.items():
            if name != "heldout.jsonl":
                random.Random(args.seed).shuffle(values)  # the same order in both forms
            text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "tasks.txt").write_text("".join(f"{task}\n" for task in tasks), encoding="utf-8")
    Console(width=None if console.is_terminal else 119).print(
        describe(sorted(rows, key=lambda made: made.family.name), args.heldout, tokenizer)
    )
    print(f"{args.output}: {len(rows)} rows in two forms, {len(chats)} chats, {len(heldout)} held-out problems")


if __name__ == "__main__":
    main()
