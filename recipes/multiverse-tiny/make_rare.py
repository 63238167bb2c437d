"""Write rows that teach the embedded model to fork rarely, and problems on which reinforcement learning undoes that.

Both are flat problems of two to four chains. Most rows have the sequential answer, though the prompt asks for a
parallel one. ``sft_rare.yaml`` trains on the rows, and then ``grpo.yaml`` on the problems, which are others.

    python recipes/multiverse-tiny/make_rare.py --output runs/multiverse-tiny/rare-data
    python recipes/multiverse-tiny/make_rare.py --output runs/multiverse-tiny/rarer --share 0.02 --rows 800
"""

import json
import random
from itertools import islice
from pathlib import Path

from multiverse_hf.data.chains import Kind, document
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.documents import parse_document
from multiverse_hf.errors import ScriptParser
from multiverse_hf.evaluation.chains import unseen_chains
from multiverse_hf.outputs import check_output, output_folder

MAX_CHAINS, MAX_OPS = 4, 3


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    parser = ScriptParser(description=description, epilog="examples:\n    python" + examples)
    parser.add_argument("--output", type=Path, required=True, help="folder for rows.jsonl and problems.jsonl")
    parser.add_argument("--rows", type=int, default=1600, help="rows to fine-tune on (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=2000, help="problems without answers (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.1, help="share of rows that fork (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of problems and forks (default: %(default)s)")
    args = parser.parse_args()
    if args.rows < 1 or args.problems < 1:
        parser.error(f"--rows and --problems must be at least 1, got {args.rows} and {args.problems}")
    if not 0 <= args.share <= 1:
        parser.error(f"--share must be between 0 and 1, got {args.share}")
    check_output(args.output)
    rng = random.Random(args.seed)
    drawn = unseen_chains(Kind.FLAT, args.seed, max_chains=MAX_CHAINS, max_ops=MAX_OPS)
    rows = []
    for problem in islice(drawn, args.rows):
        text = document(problem)
        if rng.random() >= args.share:
            text = parse_document(text).sequential()
        rows.append({"prompt": str(problem), "document": text, "answer": str(problem.answer)})
    problems = [
        {"prompt": Suffix.PARALLEL.end(str(problem)), "answer": str(problem.answer), "task": "chains"}
        for problem in islice(drawn, args.problems)
    ]
    with output_folder(args.output) as folder:
        for name, lines in (("rows", rows), ("problems", problems)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    forks = sum("<Parallel>" in row["document"] for row in rows)
    print(f"{args.output}: {len(rows)} rows, {forks} of them with a block, and {len(problems)} problems")


if __name__ == "__main__":
    main()
