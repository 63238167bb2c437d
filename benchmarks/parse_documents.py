"""How fast documents parse: many documents of a given size, parsed, rendered and compared.

python benchmarks/parse_documents.py
python benchmarks/parse_documents.py --documents 1000 --characters 30000
"""

import json
import platform
import random
import time

from multiverse_hf.documents import parse_document
from multiverse_hf.errors import ScriptParser

WORDS = ("so the sum a < b & c gives <sub>2</sub> and $x^2 + 1$ which holds for every", "n.\n")


def make_document(rng: random.Random, characters: int, blocks: int = 8, paths: int = 3) -> str:
    """Make a document of about that many characters: text, and blocks of paths after one another."""
    share = characters // (blocks * (paths + 1))

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=share // 40 + 1))[:share]

    parts = []
    for _ in range(blocks):
        outlines = "".join(f"<Outline>\n{n}: part\n</Outline>\n" for n in range(1, paths + 1))
        body = "".join(f"<Path>\n{n}: {text()}\n</Path>\n" for n in range(1, paths + 1))
        parts.append(
            f"{text()}\n<Parallel>\n<Goal>\n{outlines}</Goal>\n{body}<Conclusion>\ndone\n</Conclusion>\n</Parallel>\n"
        )
    return f"<Think>\n{''.join(parts)}</Think>\n\nAnswer: 1"


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--characters", type=int, default=30_000, help="of each document")
    args = parser.parse_args()
    for name in ("documents", "characters"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    rng = random.Random(0)
    documents = [make_document(rng, args.characters) for _ in range(args.documents)]
    begin, begin_cpu = time.perf_counter(), time.process_time()
    trees = [parse_document(document) for document in documents]
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - begin_cpu
    if any(tree.render() != document for tree, document in zip(trees, documents, strict=True)):
        raise SystemExit("a document does not render to the text it was parsed from")
    mean = sum(map(len, documents)) / len(documents)
    print(
        f"{len(documents)} documents of {mean:.0f} characters parsed in {seconds:.2f} s ({cpu_seconds:.2f} s of CPU)"
    )
    result = {"documents": len(documents), "mean_characters": round(mean), "seconds": round(seconds, 3)}
    result["cpu_seconds"] = round(cpu_seconds, 3)
    print(json.dumps(result | {"python": platform.python_version(), "machine": platform.machine()}))


if __name__ == "__main__":
    main()
