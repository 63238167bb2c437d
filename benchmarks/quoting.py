"""What stage 4 costs by quoting sentence numbers, against having a model copy the text: tokens, and calls that fail.

Both sides are asked for the same documents, quoting with the curator's own prompt, copying with one that differs in
what it asks for only; both answer without a fault, by the tests' rule server's rule. So the tokens are those of a
perfect model. A reply longer than the endpoint lets one be is cut off, and asking again does not help: such a document
is lost to copying, after all its attempts. Tokens are o200k's (pip install bpe-openai), or a tokenizer's you name.

    python benchmarks/quoting.py --documents multiverse-1k-samples --output quoting.json
    python benchmarks/quoting.py --chains 200 --tokenizer src/multiverse_hf/assets/multiverse-tiny
"""

import argparse
import json
import random
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from report import count, environment, finish, make_parser, show_environment

from multiverse_hf.curator.assembly import original_text, reasoning_of
from multiverse_hf.curator.curation import write_messages
from multiverse_hf.curator.drafts import Draft, Limits
from multiverse_hf.curator.options import Settings
from multiverse_hf.curator.stages import STAGES
from multiverse_hf.curator.traces import Trace
from multiverse_hf.data.chains import document, sample_problem
from multiverse_hf.documents import Document, parse_document
from multiverse_hf.errors import one_line

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import rule_server

COPY = string.Template("""# Task: the text of each step

These are the steps that have text of their own:

$leaves

Copy for each of them the text of the reasoning that it is made of, word for word and without numbers.

- All sentences from 1 to $count are to be used, each exactly once.
- Begin each step where its topic begins: words that lead over to it belong to it.

Form: {"texts": [{"step": "1", "text": "..."}, {"step": "2.1", "text": "..."}]}
""")
REPLY_LIMITS = (2048, 4096, 8192, 16384)
REFILL = next(stage for stage in STAGES if stage.name == "refill")


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--documents", type=Path, help="folder with published documents, *.xml")
    parser.add_argument("--chains", type=count, default=100, help="documents of the chains family (default: 100)")
    parser.add_argument("--tokenizer", help="folder or repository of a tokenizer (default: o200k)")
    args = parser.parse_args()
    measure = open_tokenizer(args.tokenizer, parser)
    sources = {"chains": list(chains(args.chains, args.seed))}
    if args.documents is not None:
        if not (paths := sorted(args.documents.glob("*.xml"))):
            parser.error(f"--documents {args.documents}: no folder with .xml files")
        sources["published"] = [parse_document(path.read_text(encoding="utf-8").strip()) for path in paths]
    result: dict[str, Any] = {"benchmark": "quoting", **environment(), "tokenizer": args.tokenizer or "o200k"}
    result["results"] = [compare(name, found, measure) for name, found in sources.items() if found]
    show_environment(result)
    for each in result["results"]:
        show_comparison(each)
    finish(result, args.output)


def open_tokenizer(name: str | None, parser: argparse.ArgumentParser) -> Callable[[str], int]:
    """Return what counts the tokens of a text."""
    if name is not None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as err:  # transformers and the Hub raise errors of their own
            parser.error(f"--tokenizer {name}: {one_line(err, 160)}")
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    try:
        from bpe_openai import get_encoding
    except ModuleNotFoundError:
        parser.error("o200k needs bpe-openai: pip install bpe-openai; or name a --tokenizer")
    encoding = get_encoding("o200k_base")
    return lambda text: len(encoding.encode(text))


def chains(number: int, seed: int) -> Iterator[Document]:
    rng = random.Random(seed)
    for place in range(number):
        problem = sample_problem(rng, "nested" if place % 2 else "flat")
        yield parse_document(document(problem).partition("\n\nAnswer")[0])


def compare(name: str, documents: list[Document], measure: Callable[[str], int]) -> dict[str, Any]:
    """Compare both ways on some documents."""
    sums = {way: {"asked": 0, "answered": 0} for way in ("quoting", "copying")}
    replies: dict[str, list[int]] = {"quoting": [], "copying": []}
    for found in documents:
        for way, (asked, answered) in tokens(found, measure).items():
            sums[way]["asked"] += asked
            sums[way]["answered"] += answered
            replies[way].append(answered)
    attempts = Settings("m").max_attempts
    cut = {way: [sum(each > limit for each in found) for limit in REPLY_LIMITS] for way, found in replies.items()}
    return {
        "documents": name,
        "number": len(documents),
        "tokens": sums,
        "longest_reply": {way: max(found) for way, found in replies.items()},
        "reply_limits": REPLY_LIMITS,
        "cut_off": cut,
        "calls": {way: [len(documents) + (attempts - 1) * each for each in found] for way, found in cut.items()},
    }


def tokens(found: Document, measure: Callable[[str], int]) -> dict[str, tuple[int, int]]:
    """Return the tokens asked and answered for one document in both ways."""
    draft = Draft.begin(Trace(1, "1", "The problem.", reasoning_of(found)), Limits())
    sentences = [sentence.strip() for sentence in draft.sentences]
    for stage in STAGES[: STAGES.index(REFILL)]:
        draft = stage.check(draft, stage.form.model_validate(rule_server.answer(stage.name, found, sentences)))
    quotes = rule_server.answer("refill", found, sentences)
    REFILL.check(draft, REFILL.form.model_validate(quotes))
    texts = original_text(REFILL.form.model_validate(quotes), draft.sentences)
    copies = {"texts": [{"step": step, "text": text} for step, text in texts.items()]}
    system, user = (message["content"] for message in write_messages(REFILL, draft))
    copy = f"{draft.opening}\n\n{COPY.substitute(REFILL.variables(draft)).strip()}"
    return {
        "quoting": (measure(system) + measure(user), measure(json.dumps(quotes))),
        "copying": (measure(system) + measure(copy), measure(json.dumps(copies, ensure_ascii=False))),
    }


def show_comparison(each: dict[str, Any]) -> None:
    """Print a comparison."""
    print(f"{each['number']} documents, {each['documents']}:")
    for way, found in each["tokens"].items():
        cut = ", ".join(
            f"{n} of them above {m}" for m, n in zip(each["reply_limits"], each["cut_off"][way], strict=True)
        )
        print(f"  {way}: {found['asked']} tokens asked, {found['answered']} answered; replies: {cut}")
    ratio = each["tokens"]["copying"]["answered"] / each["tokens"]["quoting"]["answered"]
    print(f"  copying answers with {ratio:.1f} times the tokens")


if __name__ == "__main__":
    main()
