"""Shared parts of the dataset builders: options, the tokenizer, and writing a folder whole or not at all."""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from multiverse_hf.errors import INTERRUPTED, USAGE, CommandError, ScriptParser, install_line, one_line

try:
    if sys.stderr.isatty() and not {"-h", "--help"} & set(sys.argv):
        print("loading torch, transformers and datasets", file=sys.stderr)
    import datasets  # noqa: F401 - used at the end of the work, too late to report that it is missing
    import matplotlib  # noqa: F401
    from tqdm.auto import tqdm
except ModuleNotFoundError as err:
    raise SystemExit(f"{Path(sys.argv[0]).name}: {err.name} is missing; {install_line('train')}") from None

from multiverse_hf.checkpoints import EMBEDDED, EMBEDDED_NAMES
from multiverse_hf.data.examples import Example, ExampleReader
from multiverse_hf.data.folders import DROPPED, About, write_dataset
from multiverse_hf.data.measures import Ruler
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.outputs import check_new_folder, new_folder


def build_parser(description: str, title: str | None, licence: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every builder has."""
    parser = ScriptParser(description=description)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; new, or empty")
    parser.add_argument("--title", help=f"of the card (default: {title or 'the folder name'})", default=title)
    parser.add_argument(
        "--license",
        required=licence is None,
        default=licence,
        help="the Hub's name of the rows' licence, e.g. apache-2.0" + (f" (default: {licence})" if licence else ""),
    )
    parser.add_argument("--language", nargs="+", default=["en"], help="codes of the rows' languages (default: en)")
    parser.add_argument(
        "--tokenizer",
        help="folder or repository of the tokenizer that counts tokens and # parallel; tags it lacks are added "
        "(default: the embedded multiverse-tiny, with about a token a character)",
    )
    parser.add_argument("--test-share", type=float, default=0.05, help="share of prompts held out (default: 0.05)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the passes of `mixed` (default: 0)")
    return parser


@contextlib.contextmanager
def errors_in_a_line(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the program with one line if the input, a file or the disk fails."""
    try:
        yield
    except (CommandError, ValueError, OSError) as err:
        parser.exit(getattr(err, "code", USAGE), f"error: {one_line(err)}\n")
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, "stopped; nothing is written\n")


def check_options(args: argparse.Namespace) -> None:
    """Check what would fail late.

    Raises:
        CommandError: with the next step.
    """
    if not 0 <= args.test_share < 1:
        raise CommandError(f"--test-share must be from 0 to below 1, got {args.test_share}")
    if args.title is None:
        args.title = args.output.resolve().name
    if args.seed < 0:
        raise CommandError(f"--seed must be at least 0, got {args.seed}")
    for name in ("title", "license"):
        if not getattr(args, name).strip():
            raise CommandError(f"--{name} is empty; leave it out, or say what it is")
    check_new_folder(args.output)


def open_ruler(name: str | None) -> Ruler:
    """Return the ruler with the tokenizer.

    Raises:
        CommandError: if there is none.
    """
    from transformers import AutoTokenizer

    source = name or EMBEDDED_NAMES[0]
    folder = Path(source).expanduser()
    is_embedded = not folder.exists() and source in EMBEDDED_NAMES
    try:
        tokenizer = AutoTokenizer.from_pretrained(EMBEDDED.parent / source if is_embedded else str(folder))
        try:
            tags = TagSet.from_tokenizer(tokenizer)
        except ValueError:
            tags = TagSet.add_to(tokenizer)
    except Exception as err:  # a tokenizer is input: transformers and the Hub raise errors of their own
        raise CommandError(f"cannot load the tokenizer {source}: {one_line(err, 200)}") from err
    # only the folder's name, as its place is private
    return Ruler(tokenizer, tags, folder.resolve().name if folder.exists() else source)


def build(
    args: argparse.Namespace, ruler: Ruler, reader: ExampleReader, examples: Iterable[Example], about: About
) -> None:
    """Write the folder, and print its contents.

    Raises:
        CommandError, ValueError: if nothing can be read or written.
    """
    with new_folder(args.output) as folder:
        summary = write_dataset(folder, examples, reader, ruler, about, args.test_share, args.seed)
    rows = ", ".join(f"{part['rows']} {split}" for split, part in summary["splits"].items())
    print(f"{args.output}: {rows} rows, {len(reader.dropped)} dropped")
    for entry in reader.dropped[:5]:
        print(f"  {entry['source']}, line {entry['line']}: {entry['reason']}: {one_line(entry['detail'], 160)}")
    if reader.dropped:
        print(f"all that was dropped: {args.output / DROPPED}")


def progress(rows: Iterable, what: str, total: int | None = None) -> Iterator:
    """Show the progress of reading rows in a terminal."""
    yield from tqdm(rows, desc=what, total=total, unit=" rows", disable=None)
