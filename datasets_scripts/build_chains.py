"""Build a dataset of the chains family, which needs no curator: a folder with a card and parquet.

    python datasets_scripts/build_chains.py --num-rows 2000 --output chains
    accelerate launch --quiet recipes/sft.py --config recipes/multiverse-tiny/sft.yaml --dataset_name ./chains \\
      --dataset_config multiverse --output_dir runs/chains
    python datasets_scripts/publish.py chains OWNER/chains
"""

from collections.abc import Iterator
from typing import Any

from building import About, build, build_parser, check_options, errors_in_a_line, open_ruler, progress

from multiverse_hf.checkpoints import quiet
from multiverse_hf.data.chains import document
from multiverse_hf.data.examples import ExampleReader
from multiverse_hf.data.mixtures import ChainsMixture

MADE = """\
- Problems are drawn with a seed: sums of up to eight chains of additions that do not depend on each other, alone, side
  by side or in groups. They begin short and grow.
- Documents are written by a program, so every answer is right; a problem drawn twice is dropped the second time.
- Rows of one prompt are either all in train or all in test."""


def rows(mixture: ChainsMixture) -> Iterator[tuple[int, dict[str, Any]]]:
    """Return the rows with their numbers from 1."""
    for number, row in enumerate(mixture, start=1):
        problem = row.problem
        yield (
            number,
            {
                "prompt": str(problem),
                "document": document(problem),
                "answer": str(problem.answer),
                "provenance": {"kind": problem.kind, "chains": len(problem.chains), "seed": mixture.seed},
            },
        )


def main() -> None:
    parser = build_parser(__doc__, "Chains", licence="apache-2.0")
    parser.add_argument("--num-rows", type=int, default=10_000, help="problems to draw (default: 10000)")
    parser.add_argument("--rows-seed", type=int, default=1, help="of the problems (default: 1)")
    args = parser.parse_args()
    quiet()
    with errors_in_a_line(parser):
        mixture = ChainsMixture(args.num_rows, args.rows_seed)
        check_options(args)
        reader, about = ExampleReader(), About(args.title, args.license, MADE, args.language)
        examples = reader.read(progress(rows(mixture), "chains", args.num_rows), "chains")
        build(args, open_ruler(args.tokenizer), reader, examples, about)


if __name__ == "__main__":
    main()
