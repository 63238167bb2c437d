"""Memory and time of what says which token sees which, against the length of a row.

Rows are documents of random text with blocks of two to four paths, one row a batch. Three ways to the same visibility:

- ours: ``DocumentCollator`` lays the row out, ``block_mask`` makes the tables of flex_attention from its segments.
- published: two dense masks of float32, L x L, for each row, on the host: the one made from the document's tags, and
  its copy in the batch. Reimplemented here.
- dense bool: the mask of L x L that attn_implementation="sdpa" takes.

Bytes are those of tensors that have to be kept for the row's pass: positions, segments, what they see, which tokens
are real, the tables. The row's own ids and labels are not counted, as every way needs them. The peak is that of all
tensors alive while it is made, ids and labels among them. Milliseconds are those of the collator, which lays the row
out, and of the mask. Dense masks are built up to --dense-up-to tokens; above it their bytes are computed, not built.
With --threads 1 it is as in a worker of a DataLoader, and other work on the machine disturbs it least.

    python benchmarks/mask_memory.py
    python benchmarks/mask_memory.py --lengths 4096 32768 --path-tokens 30 120 --dense-up-to 4096
    python benchmarks/mask_memory.py --threads 1 --output benchmarks/results/mask_memory_cpu.json
    python benchmarks/mask_memory.py --stored mask_memory.json --plot mask_memory.png
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import peak_of
from plots import make_axes, plot_file, save
from report import count, environment, finish, make_parser, show, show_environment, spread
from tqdm import tqdm
from workload import EOS, make_document, make_tags

from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.rows import document_labels
from multiverse_hf.evaluation.experiments.timing import in_turns
from multiverse_hf.modeling.layout import Layout, build_layout
from multiverse_hf.modeling.masks import block_mask, dense_mask
from multiverse_hf.modeling.tags import TagSet

LENGTHS = [1 << power for power in range(10, 17)]
VOCAB = 32_000
MULTIPLE = 128  # tokens that rows are padded to, as for compiled kernels
CHECKED = 2048  # tokens; to here the masks of all three ways are compared entry by entry
TARGET = {"tokens": 32_768, "bytes": 2_000_000, "ms": 50}
CPU = torch.device("cpu")

Batch = dict[str, torch.Tensor]


def collate(row: dict[str, list[int]], tags: TagSet) -> Batch:
    return DocumentCollator(tags, EOS, multiple=MULTIPLE)([row])


def layout_of(batch: Batch) -> tuple[torch.Tensor, ...]:
    return batch["position_ids"], batch["segment_ids"], batch["visible"], batch["attention_mask"]


def parts_of(batch: Batch, mask: Any) -> dict[str, int]:
    """Return the bytes to be kept, by what they are for; a tensor that several hold counts once."""
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    names += tuple(name.replace("kv", "q") for name in names)
    held = [cell.cell_contents for cell in mask.mask_mod.__closure__ or ()]  # what the kernel asks about a pair
    parts = {name: [batch[name]] for name in ("position_ids", "segment_ids", "visible", "attention_mask")}
    parts |= {
        "tables": [getattr(mask, name) for name in names],
        "mask_mod": [each for each in held if isinstance(each, torch.Tensor)],
    }
    seen: set[int] = set()
    return {name: sum_bytes(tensors, seen) for name, tensors in parts.items()}


def sum_bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Sum up the bytes of tensors whose storage is not among ``seen``, and add it."""
    total = 0
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() not in seen:
            seen.add(tensor.untyped_storage().data_ptr())
            total += tensor.numel() * tensor.element_size()
    return total


def published_masks(ids: list[int], tags: TagSet) -> list[torch.Tensor]:
    """Make the two dense masks: a bool triangle, the squares of siblings taken out, as float32, and once more."""
    length = len(ids)
    seen = torch.ones(length, length, dtype=torch.bool).tril_()
    blocks: list[list[slice]] = []
    begins: list[int] = []
    for index, token in enumerate(ids):
        if token == tags.open("parallel"):
            blocks.append([])
        elif token == tags.open("path"):
            begins.append(index)
        elif token == tags.close("path"):
            own = slice(begins.pop(), index + 1)
            for sibling in blocks[-1]:
                seen[own, sibling] = False
            blocks[-1].append(own)
        elif token == tags.close("parallel"):
            blocks.pop()
    added = torch.full((length, length), -torch.inf).masked_fill_(seen, 0)
    batch = torch.zeros(1, 1, length, length)
    batch[0, 0] = added
    return [added, batch]


def check(ids: list[int], row: dict[str, list[int]], tags: TagSet) -> None:
    """Compare the three ways, entry by entry.

    Raises:
        RuntimeError: if they differ.
    """
    from torch.nn.attention.flex_attention import create_mask

    batch = collate(row, tags)
    dense, length = dense_mask(*layout_of(batch)), len(ids)
    width = dense.shape[-1]
    asked = create_mask(block_mask(*layout_of(batch)).mask_mod, 1, None, width, width, device="cpu")
    published = published_masks(ids, tags)[1] == 0
    if not (torch.equal(dense, asked) and torch.equal(dense[..., :length, :length], published)):
        raise RuntimeError(f"the masks of a document of {length} tokens differ between the ways to make them")


class Subject:
    """A row of one length, and what was measured of it."""

    def __init__(self, length: int, tags: TagSet, args: argparse.Namespace) -> None:
        self.length, self.tags = length, tags
        self.ids = make_document(tags, length, VOCAB, tuple(args.path_tokens), args.seed)
        self.row = {"input_ids": self.ids, "labels": document_labels(self.ids, tags)}
        self.layout: Layout = build_layout(self.ids, tags)
        self.built = length <= args.dense_up_to
        self.ms: dict[str, list[float]] = {}

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        output = work()
        self.ms.setdefault(name, []).append(1000 * (time.perf_counter() - begin))
        return output

    def measure(self) -> None:
        """Make everything once."""
        self._timed("layout", lambda: build_layout(self.ids, self.tags))
        batch = self._timed("collate", lambda: collate(self.row, self.tags))
        self._timed("block_mask", lambda: block_mask(*layout_of(batch)))
        self.ms.setdefault("ours", []).append(self.ms["collate"][-1] + self.ms["block_mask"][-1])
        if self.built:
            self._timed("published", lambda: published_masks(self.ids, self.tags))
            self._timed("dense_bool", lambda: dense_mask(*layout_of(batch)))

    def ours(self) -> tuple[Batch, Any]:
        batch = collate(self.row, self.tags)
        return batch, block_mask(*layout_of(batch))

    def result(self) -> dict[str, Any]:
        """Return the measurement for a result."""
        batch, mask = self.ours()
        parts = parts_of(batch, mask)
        ours = {"bytes": sum(parts.values()), "parts": parts, "peak_bytes": peak_of(self.ours, CPU)}
        ours["ms"] = spread(self.ms["ours"])
        ours["ms_of"] = {name: spread(self.ms[name]) for name in ("layout", "collate", "block_mask")}
        pairs = batch["input_ids"].shape[1] ** 2
        published: dict[str, Any] = {"bytes": 2 * 4 * self.length**2, "built": self.built}
        dense: dict[str, Any] = {"bytes": pairs, "built": self.built}
        if self.built:
            masks = published_masks(self.ids, self.tags)
            if (found := sum_bytes(masks, set())) != published["bytes"]:
                raise RuntimeError(f"two masks take {found} bytes, not {published['bytes']} as computed")
            del masks
            published["peak_bytes"] = peak_of(lambda: published_masks(self.ids, self.tags), CPU)
            published["ms"] = spread(self.ms["published"])
            dense["peak_bytes"] = peak_of(lambda: dense_mask(*layout_of(batch)), CPU)
            dense["ms"] = spread(self.ms["dense_bool"])
        return {
            "tokens": self.length,
            "segments": len(self.layout.visible),
            "parallelism": round(self.length / self.layout.length, 4),
            "ours": ours,
            "published": published,
            "dense_bool": dense,
        }


def exponent(lengths: list[int], values: list[float]) -> float | None:
    """Return the slope of values over lengths, both as logarithms; None of a single length."""
    if len(lengths) < 2:
        return None
    return round(float(np.polyfit(np.log(lengths), np.log(values), 1)[0]), 3)


def growth(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit how bytes and milliseconds grow, L to what power."""
    lengths = [row["tokens"] for row in results]
    return {
        "ours_bytes": exponent(lengths, [row["ours"]["bytes"] for row in results]),
        "ours_peak_bytes": exponent(lengths, [row["ours"]["peak_bytes"] for row in results]),
        "ours_ms": exponent(lengths, [row["ours"]["ms"]["median"] for row in results]),
        "published_bytes": exponent(lengths, [row["published"]["bytes"] for row in results]),
    }


def judge(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return whether the target holds, None if its length was not measured."""
    for row in results:
        if row["tokens"] == TARGET["tokens"]:
            size, took = row["ours"]["bytes"], row["ours"]["ms"]["median"]
            return TARGET | {"holds": size < TARGET["bytes"] and took < TARGET["ms"], "found": [size, took]}
    return None


def human(size: float) -> str:
    """Write bytes: 1.94 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def print_results(result: dict[str, Any]) -> None:
    """Print all of it, for people."""
    print(f"\n{'':16}{'ours':>9}{'':>10}{'':26}   {'published: 2 x float32':34}dense bool")
    print(
        f"{'tokens':>7} {'segments':>8}{'kept':>9}{'peak':>10}   {'ms [least, greatest]':24}"
        f"{'kept':>9}{'peak':>9}{'ms':>9}{'kept':>14}{'ms':>9}"
    )
    for row in result["results"]:
        ours, published, dense = row["ours"], row["published"], row["dense_bool"]
        cells = [human(published["bytes"])]
        if published["built"]:
            cells += [human(published["peak_bytes"]), f"{published['ms']['median']:.4g}"]
        theirs = (
            "".join(f"{cell:>9}" for cell in cells) if published["built"] else f"{cells[0]:>9}  computed, not built"
        )
        took = f"{dense['ms']['median']:.4g}" if dense["built"] else "computed"
        print(
            f"{row['tokens']:7} {row['segments']:8}{human(ours['bytes']):>9}{human(ours['peak_bytes']):>10}   "
            f"{show(ours['ms']):24}{theirs:34}{human(dense['bytes']):>7}{took:>9}"
        )
    last = result["results"][-1]
    parts = ", ".join(f"{name} {human(size)}" for name, size in last["ours"]["parts"].items())
    stages = ", ".join(f"{name} {show(ms)}" for name, ms in last["ours"]["ms_of"].items())
    print(f"\nours at {last['tokens']} tokens: {parts}; ms: {stages} (collate includes a layout)")
    grown = result["growth"]
    if grown["ours_bytes"] is not None:
        print(
            f"growth with the length L: ours L^{grown['ours_bytes']} in bytes kept, L^{grown['ours_peak_bytes']} at "
            f"the peak, L^{grown['ours_ms']} in time; published L^{grown['published_bytes']} in bytes"
        )
    if (target := result["target"]) is None:
        print(f"the target is at {TARGET['tokens']} tokens, which were not measured")
    else:
        size, took = target["found"]
        print(
            f"target at {target['tokens']} tokens, under {human(target['bytes'])} and {target['ms']} ms: "
            f"{'holds' if target['holds'] else 'DOES NOT HOLD'} ({human(size)}, {took:.4g} ms)"
        )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Draw bytes against the length."""
    figure, axes = make_axes("tokens of a row", "bytes kept")
    axes.set_yscale("log", base=10)
    lengths = [row["tokens"] for row in results]
    labels = {"published": "two dense float32 masks", "dense_bool": "dense bool mask", "ours": "layout and BlockMask"}
    for name, label in labels.items():
        sizes = [row[name]["bytes"] for row in results]
        power = exponent(lengths, sizes)
        grows = "" if power is None else f", L^{power:.2f}"
        (line,) = axes.plot(lengths, sizes, linewidth=1, label=label + grows)
        built = [row[name].get("built", True) for row in results]
        for is_built in (True, False):
            at = [place for place, each in enumerate(built) if each == is_built]
            face = line.get_color() if is_built else "white"
            axes.scatter(
                [lengths[i] for i in at],
                [sizes[i] for i in at],
                s=18,
                facecolor=face,
                edgecolor=line.get_color(),
                zorder=3,
            )
    axes.legend(title="hollow: computed, not built", frameon=False, alignment="left")
    save(figure, path)


def main() -> None:
    parser = make_parser(__doc__, repeats=5)
    parser.add_argument(
        "--lengths", type=count, nargs="+", default=LENGTHS, help="tokens of a row (default: 1k to 64k)"
    )
    parser.add_argument(
        "--path-tokens",
        type=count,
        nargs=2,
        default=[100, 400],
        metavar=("LEAST", "MOST"),
        help="tokens of text in a path; shorter paths make more segments (default: 100 400)",
    )
    parser.add_argument(
        "--dense-up-to",
        type=count,
        default=8192,
        help="tokens up to which dense masks are built (default: %(default)s)",
    )
    parser.add_argument("--plot", type=plot_file, default=None, help="also draw bytes against tokens to this PNG file")
    parser.add_argument("--stored", type=Path, default=None, help="measure nothing: show and draw this JSON result")
    args = parser.parse_args()
    if args.stored is not None:
        try:
            result = json.loads(args.stored.read_bytes())
            print_results(result)
            if args.plot is not None:
                plot(result["results"], args.plot)
        except (OSError, ValueError, KeyError, TypeError) as err:
            parser.error(f"{args.stored} is no result of this benchmark: {err!r}")
        return
    if args.path_tokens[0] > args.path_tokens[1]:
        parser.error(f"--path-tokens takes the fewest and then the most, got {args.path_tokens}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tags = make_tags(newlines=False)
    try:
        subjects = [Subject(length, tags, args) for length in sorted(set(args.lengths))]
    except ValueError as err:
        parser.error(str(err))
    result = {"benchmark": "mask_memory", **environment()}
    show_environment(result)
    for subject in subjects:
        if subject.length <= min(CHECKED, args.dense_up_to):
            check(subject.ids, subject.row, tags)
        collate(subject.row, tags)  # warms up
    with tqdm(total=len(subjects) * args.repeats, unit="row", file=sys.stderr) as bar:
        for subject in in_turns(subjects, args.repeats):
            bar.set_description(f"{subject.length} tokens", refresh=False)
            subject.measure()
            bar.update()
    result |= {"path_tokens": args.path_tokens, "repeats": args.repeats, "dense_up_to": args.dense_up_to}
    result["results"] = [subject.result() for subject in subjects]
    result["growth"] = growth(result["results"])
    result["target"] = judge(result["results"])
    print_results(result)
    if args.plot is not None:
        plot(result["results"], args.plot)
    finish(result, args.output)


if __name__ == "__main__":
    main()
