"""Build a dataset like Multiverse-1K: a folder with a card and parquet, to train on as it is or to publish.

    python datasets_scripts/build_multiverse_1k.py --curated curated.jsonl --license apache-2.0 --output Multiverse-1K
    python datasets_scripts/build_multiverse_1k.py --published OWNER/Multiverse-1K --s1k simplescaling/s1K-1.1 \\
      --license apache-2.0 --tokenizer Qwen/Qwen2.5-32B-Instruct --output Multiverse-1K
    accelerate launch --quiet recipes/sft.py --config recipes/qwen2.5-7b/sft.yaml --dataset_name Multiverse-1K \\
      --dataset_config multiverse --dataset_test_split test
    python datasets_scripts/publish.py Multiverse-1K OWNER/Multiverse-1K

--curated takes rows with a prompt, a document and, if they like, an id, an answer, a provenance and the text of the
sequential form; --published rows in the columns of Multiverse-1K. Both take files (.jsonl, .json, .parquet, .csv),
folders and datasets on the Hub. --s1k has s1K-1.1, whose reasoning becomes the sequential form of rows with the same
question. A row that is not fit to train on is dropped, and listed with its line and reason.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from building import About, build, build_parser, check_options, errors_in_a_line, open_ruler, progress

from multiverse_hf.checkpoints import quiet
from multiverse_hf.data.examples import Example, ExampleReader
from multiverse_hf.data.records import number_rows
from multiverse_hf.errors import CommandError


def name_of(source: str) -> str:
    """Return the name of a source as the dataset has it: a file's own, without its folders."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def read_examples(reader: ExampleReader, args: argparse.Namespace) -> Iterator[Example]:
    """Read all sources, in the order in which they are named."""
    for source in args.s1k:
        reader.read_trajectories(progress(number_rows(source), name_of(source)), name_of(source))
    for sources, is_published in ((args.curated, False), (args.published, True)):
        for source in sources:
            name = name_of(source)
            yield from reader.read(progress(number_rows(source), name), name, is_published)


def tell(args: argparse.Namespace) -> str:
    """Return the card's text on how the rows are made."""
    lines = []
    if args.curated:
        lines.append("- Curated rows are taken as they are; `provenance` says how each was made.")
    if args.published:
        lines.append("- Rows published as Multiverse-1K: `question`, the parallel trajectory, and the final answer.")
    if args.s1k:
        lines.append("- The reasoning of s1K-1.1 is the sequential form of rows that ask the same question.")
    lines += [
        "- An answer that a document does not say itself is put after its reasoning, which stands in `<Think>`.",
        "- Every document is parsed and checked: one path for each outline, labels that agree, nothing empty, no text",
        "  between structural tags. A row that fails is dropped.",
        "- Rows of one prompt are either all in train or all in test.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = build_parser(__doc__, title=None, licence=None)
    parser.add_argument("--curated", nargs="+", default=[], metavar="ROWS", help="rows of a curator, or your own")
    parser.add_argument("--published", nargs="+", default=[], metavar="ROWS", help="rows of Multiverse-1K")
    parser.add_argument(
        "--s1k", nargs="+", default=[], metavar="ROWS", help="rows of s1K-1.1, for the sequential form"
    )
    args = parser.parse_args()
    quiet()
    with errors_in_a_line(parser):
        if not args.curated and not args.published:
            raise CommandError("there is nothing to build from; name rows with --curated or --published")
        if any(not source.strip() or source == "." for source in (*args.curated, *args.published, *args.s1k)):
            raise CommandError("a source is empty; name a file, a folder or a dataset on the Hub")
        names = [name_of(source) for source in (*args.curated, *args.published, *args.s1k)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CommandError(f"several sources are called {twice[0]}; rows are identified by it, so rename one")
        check_options(args)
        reader, about = ExampleReader(), About(args.title, args.license, tell(args), args.language)
        build(args, open_ruler(args.tokenizer), reader, read_examples(reader, args), about)


if __name__ == "__main__":
    main()
