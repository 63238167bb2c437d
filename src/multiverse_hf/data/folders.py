"""A dataset as a folder that ``load_dataset`` reads, locally and from the Hub: a card with configs, and parquet.

The files do not depend on the clock, on paths or on the machine. With the same versions of libraries, two builds of
the same rows are equal to the byte.
"""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from multiverse_hf.data.curriculum import PAPER_SHARES, Choice, CurriculumSampler
from multiverse_hf.data.examples import Example, ExampleReader, split_examples
from multiverse_hf.data.measures import Measures, Ruler
from multiverse_hf.data.records import Form
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX, Suffix
from multiverse_hf.documents import parse_document

COLUMNS = {
    "id": ("string", "the row's name, the same in all configs"),
    "prompt": ("string", "what is asked"),
    "document": ("string", "the whole answer in the row's form, to train on as it is"),
    "answer": ("string", "the final answer alone, null where it is not known"),
    "source": ("string", "the file or dataset that the row was read from"),
    "provenance": ("string", "how the row was made, as JSON"),
    "sequential_from": ("string", "origin of the text, as described above"),
    "epoch": ("int32", "the pass over all rows, from 0"),
    "form": ("string", "`parallel` or `sequential`"),
    "num_blocks": ("int32", "blocks of the document"),
    "num_paths": ("int32", "paths of all blocks"),
    "depth": ("int32", "how deep blocks nest; 0 without a block"),
    "num_words": ("int32", "words of the document, tags excluded"),
    "num_tokens": ("int32", "tokens of the document, all paths"),
    "length": ("int32", "tokens of its critical path"),
    "parallelism": ("float64", "# parallel: `num_tokens` over `length`"),
}
_SAID = ("id", "prompt", "document", "answer", "source", "provenance")
CONFIGS = {
    "multiverse": (*_SAID, "num_blocks", "num_paths", "depth", "num_words", "num_tokens", "length", "parallelism"),
    "autoregressive": (*_SAID, "sequential_from", "num_words", "num_tokens"),
    "mixed": ("epoch", "form", "id", "prompt", "document", "answer", "num_tokens"),
}
CARD_FILE, DROPPED, STATISTICS, PLOTS = "README.md", "dropped_rows.jsonl", "statistics.json", "statistics.png"
_KINDS = ("think", "goal", "path", "conclusion", "answer", "tag")
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))
_GROUP = 1000  # rows that parquet compresses together; only these are in memory at once


@dataclass(frozen=True, slots=True)
class Measured:
    """An example with the measures of both its forms."""

    example: Example
    parallel: Measures
    sequential: Measures


@dataclass(frozen=True)
class About:
    """Facts on a card that do not follow from the rows.

    Attributes:
        title: title of the dataset.
        licence: the Hub's name of the licence.
        made: how the rows are made, as Markdown.
        languages: codes of the languages.
        tags: tags by which the Hub finds the dataset.
    """

    title: str
    licence: str
    made: str
    languages: Sequence[str] = ("en",)
    tags: Sequence[str] = ("multiverse", "reasoning", "parallel-generation")


def write_dataset(
    folder: Path,
    examples: Iterable[Example],
    reader: ExampleReader,
    ruler: Ruler,
    about: About,
    test_share: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Write a dataset with its card, plots, statistics and list of dropped rows.

    Args:
        folder: an empty folder.
        examples: the examples, in order.
        reader: reader of the examples, which knows the dropped rows.
        ruler: measures the documents.
        about: facts for the card.
        test_share: share of the prompts to hold out as the split ``test``.
        seed: seed of the split, and of the forms and order of rows in each pass of ``mixed``.

    Returns:
        The statistics.

    Raises:
        ValueError: if there is no example.
    """
    measured = {
        example.id: Measured(
            example, ruler.measure(example.document), ruler.measure(parse_document(example.sequential))
        )
        for example in examples
    }
    if not measured:
        first = "".join(f"; the first: {_entry(entry)}" for entry in reader.dropped[:1])
        raise ValueError(f"none of {reader.num_rows.total()} rows is fit for a dataset{first}")
    parted = split_examples([each.example for each in measured.values()], test_share, seed)
    splits = {name: [measured[example.id] for example in part] for name, part in parted.items() if part}
    infos = {}
    for config in CONFIGS:
        (folder / config).mkdir()
        infos[config] = _write_config(folder / config, config, splits, seed)
    summary = _summarize(splits, reader, ruler, seed)
    (folder / STATISTICS).write_text(json.dumps(summary, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / DROPPED).write_text(reader.dropped_lines(), encoding="utf-8")
    draw_plots(folder / PLOTS, [each.parallel for part in splits.values() for each in part], ruler.name)
    (folder / CARD_FILE).write_text(_card(summary, infos, reader, about), encoding="utf-8")
    return summary


# Rows


def _multiverse_rows(part: Sequence[Measured], seed: int) -> Iterator[dict[str, Any]]:
    for each in part:
        measures = {name: getattr(each.parallel, name) for name in CONFIGS["multiverse"][len(_SAID) :]}
        yield _said(each.example) | {"document": each.example.document.render()} | measures


def _autoregressive_rows(part: Sequence[Measured], seed: int) -> Iterator[dict[str, Any]]:
    for each in part:
        measures = {"num_words": each.sequential.num_words, "num_tokens": each.sequential.num_tokens}
        origin = {"sequential_from": each.example.sequential_from}
        yield _said(each.example) | {"document": each.example.sequential} | origin | measures


def _said(example: Example) -> dict[str, Any]:
    return {name: getattr(example, name) for name in _SAID}


def plan_passes(num_rows: int, seed: int) -> list[list[tuple[int, Form]]]:
    """Return the paper's eight passes: each row once, in random order, a share of them in parallel form.

    The recipe's sampler draws the same passes with this seed. Row 2n of its dataset is the parallel form of example n,
    row 2n + 1 the sequential form.
    """
    choices = [Choice(2 * index, 2 * index + 1, 1, 1) for index in range(num_rows)]
    sampler = CurriculumSampler(choices, PAPER_SHARES, seed)
    return [
        [(row // 2, Form.SEQUENTIAL if row % 2 else Form.PARALLEL) for (row,) in sampler.plan(epoch)]
        for epoch in range(len(PAPER_SHARES))
    ]


def _mixed_rows(part: Sequence[Measured], seed: int) -> Iterator[dict[str, Any]]:
    for epoch, rows in enumerate(plan_passes(len(part), seed)):
        for index, form in rows:
            yield _mixed_row(part[index], epoch, form)


def _mixed_test_rows(part: Sequence[Measured], seed: int) -> Iterator[dict[str, Any]]:
    for each in part:  # the form of the last pass
        yield _mixed_row(each, len(PAPER_SHARES) - 1, Form.PARALLEL)


def _mixed_row(each: Measured, epoch: int, form: Form) -> dict[str, Any]:
    example, is_parallel = each.example, form is Form.PARALLEL
    return {
        "epoch": epoch,
        "form": str(form),
        "id": example.id,
        "prompt": (Suffix.PARALLEL if is_parallel else Suffix.SEQUENTIAL).end(example.prompt),
        "document": example.document.render() if is_parallel else example.sequential,
        "answer": example.answer,
        "num_tokens": (each.parallel if is_parallel else each.sequential).num_tokens,
    }


_ROWS: dict[tuple[str, str], Callable[[Sequence[Measured], int], Iterator[dict[str, Any]]]] = {
    ("multiverse", "train"): _multiverse_rows,
    ("multiverse", "test"): _multiverse_rows,
    ("autoregressive", "train"): _autoregressive_rows,
    ("autoregressive", "test"): _autoregressive_rows,
    ("mixed", "train"): _mixed_rows,
    ("mixed", "test"): _mixed_test_rows,
}


def _write_config(folder: Path, config: str, splits: Mapping[str, Sequence[Measured]], seed: int) -> Any:
    """Write a config's splits, and return its ``DatasetInfo``."""
    import pyarrow
    import pyarrow.parquet
    from datasets import DatasetInfo, Features, Value
    from datasets.splits import SplitDict, SplitInfo

    features = Features({name: Value(COLUMNS[name][0]) for name in CONFIGS[config]})
    schema = features.arrow_schema  # its metadata holds the features, where datasets looks for them
    infos, size = SplitDict(), 0
    for split, part in splits.items():
        path = folder / f"{split}-00000-of-00001.parquet"
        rows, num_rows, num_bytes = _ROWS[config, split](part, seed), 0, 0
        with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd", version="2.6") as writer:
            while group := list(islice(rows, _GROUP)):
                table = pyarrow.Table.from_pylist(group, schema=schema)
                writer.write_table(table)
                num_rows, num_bytes = num_rows + len(group), num_bytes + table.nbytes
        infos.add(SplitInfo(split, num_bytes=num_bytes, num_examples=num_rows))
        size += path.stat().st_size
    total = sum(info.num_bytes for info in infos.values())
    return DatasetInfo(features=features, splits=infos, download_size=size, dataset_size=total)


# Statistics


def _summarize(
    splits: Mapping[str, Sequence[Measured]], reader: ExampleReader, ruler: Ruler, seed: int
) -> dict[str, Any]:
    """Return the statistics of a dataset, as in ``statistics.json``."""
    parts = {}
    for split, part in splits.items():
        kinds = ("words_by_kind", "tokens_by_kind")
        totals = {kind: sum((getattr(each.parallel, kind) for each in part), Counter()) for kind in kinds}
        measures = {
            name: _spread([getattr(each.parallel, name) for each in part])
            for name in CONFIGS["multiverse"][len(_SAID) :]
        }
        measures["num_sequential_tokens"] = _spread([each.sequential.num_tokens for each in part])
        parts[split] = {
            "rows": len(part),
            "characters": sum(each.parallel.num_characters for each in part),
            "rows_with_blocks": sum(each.parallel.num_blocks > 0 for each in part),
            "measures": measures,
            "sequential_from": dict(sorted(Counter(each.example.sequential_from for each in part).items())),
        } | {name: {kind: total[kind] for kind in _KINDS} for name, total in totals.items()}
    passes = plan_passes(len(splits["train"]), seed)
    return {
        "splits": parts,
        "sources": {
            name: {"rows": num_rows, "kept": reader.num_kept[name]} for name, num_rows in reader.num_rows.items()
        },
        "dropped": dict(sorted(Counter(entry["reason"] for entry in reader.dropped).items())),
        "parallel_rows_by_epoch": [sum(form is Form.PARALLEL for _, form in rows) for rows in passes],
        "seed": seed,
        "tokenizer": ruler.name,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "min": min(values),
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "max": max(values),
    }


def draw_plots(path: Path, measures: Sequence[Measures], tokenizer: str) -> None:
    """Draw histograms of # parallel, tokens and blocks, and the kinds of words, as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (parallel, tokens), (blocks, kinds) = figure.subplots(2, 2)
    parallel.hist([each.parallelism for each in measures], bins=30, color="tab:green")
    parallel.set(title="# parallel", xlabel="tokens over length", ylabel="documents")
    both = [[each.num_tokens for each in measures], [each.length for each in measures]]
    tokens.hist(both, bins=30, label=["all paths", "critical path"])
    tokens.set(title=f"Tokens ({tokenizer})", xlabel="tokens", ylabel="documents")
    tokens.legend(fontsize="small")
    counts = Counter(each.num_blocks for each in measures)
    blocks.bar(list(counts), list(counts.values()), color="tab:orange")
    blocks.set(title="Blocks", xlabel="blocks of a document", ylabel="documents")
    total = sum((each.words_by_kind for each in measures), Counter())
    shown = [kind for kind in _KINDS if kind != "tag"]
    kinds.barh(shown[::-1], [total[kind] for kind in shown[::-1]], color="tab:purple")
    kinds.set(title="Words by what they are part of", xlabel="words")
    for axes in (parallel, tokens, blocks, kinds):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100, metadata={"Software": None})  # matplotlib's version would be in the file


# Card


def _card(summary: Mapping[str, Any], infos: Mapping[str, Any], reader: ExampleReader, about: About) -> str:
    """Return the card: metadata for the Hub and ``load_dataset``, then text for people."""
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCardData

    splits = summary["splits"]
    num_rows = sum(part["rows"] for part in splits.values())
    data = DatasetCardData(
        pretty_name=about.title,
        license=about.licence,
        language=list(about.languages),
        task_categories=["text-generation"],
        tags=list(about.tags),
        size_categories=[next((name for most, name in _SIZES if num_rows < most), "n>1M")],
    )
    DatasetInfosDict(infos).to_dataset_card_data(data)
    configs = [
        {
            "config_name": config,
            "data_files": [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in splits],
        }
        for config in CONFIGS
    ]
    configs[0]["default"] = True
    data.configs = configs
    body = [f"# {about.title}", "", *_usage(), "", *_forms(summary), "", "## How the rows are made", "", about.made]
    body += ["", *_statistics(summary), "", *_dropped(summary, reader), "", *_columns(), ""]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body)


def _usage() -> list[str]:
    return [
        "Answers with marked parts that do not depend on each other. A model can learn to write these parts at the",
        "same time ([Multiverse](https://arxiv.org/abs/2506.09991)).",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'rows = load_dataset("OWNER/NAME", "multiverse", split="train")  # or the folder with this file',
        "```",
    ]


def _forms(summary: Mapping[str, Any]) -> list[str]:
    shares = ", ".join(f"{100 * share:g}" for share in PAPER_SHARES)
    counts = ", ".join(map(str, summary["parallel_rows_by_epoch"]))
    origins = {
        "document": "the paths of the parallel document, one after the other, without its tags",
        "published": "the sequential text published beside the parallel one",
        "s1K-1.1": "the reasoning of s1K-1.1 that the parallel document was made from",
    }
    counted: Counter[str] = sum((Counter(part["sequential_from"]) for part in summary["splits"].values()), Counter())
    found = [f"- `{name}`: {text} ({counted[name]} rows)" for name, text in origins.items() if counted[name]]
    return [
        "| config | what |",
        "|---|---|",
        "| `multiverse` (default) | each row's parallel document, with its control tags |",
        "| `autoregressive` | the same rows in sequential form, for a baseline |",
        f"| `mixed` | the paper's {len(PAPER_SHARES)} passes over all rows, in order, {shares} % of them parallel |",
        "",
        "A sequential document is (`sequential_from`)",
        "",
        *found,
        "",
        "Prompts of `multiverse` and `autoregressive` are as they were asked. Training ends them with a sentence that",
        f'says which form is wanted, "{PARALLEL_SUFFIX}" or',
        f'"{SEQUENTIAL_SUFFIX}"; multiverse_hf\'s `recipes/sft.py` does so. In `mixed` the form is the',
        "row's own, so the sentence is there already (`sft.py --suffix false --train_sampling_strategy sequential",
        f"--bucket_batches 0 --num_train_epochs 1`). Of {summary['splits']['train']['rows']} rows its passes have",
        f"{counts} in parallel form; its test rows are parallel.",
    ]


def _statistics(summary: Mapping[str, Any]) -> list[str]:
    names = {
        "num_blocks": "blocks",
        "num_paths": "paths",
        "depth": "depth",
        "num_words": "words",
        "num_tokens": "tokens, all paths",
        "length": "tokens, critical path",
        "parallelism": "# parallel",
        "num_sequential_tokens": "tokens, sequential form",
    }
    lines = ["## Statistics", "", f"![# parallel, tokens, blocks and words]({PLOTS})", ""]
    num_tokens = sum(sum(part["tokens_by_kind"].values()) for part in summary["splits"].values())
    size = sum(part["characters"] for part in summary["splits"].values()) / num_tokens
    lines += [
        f"Tokens are those of `{summary['tokenizer']}`, {size:.1f} characters each on average; # parallel, tokens",
        "over the critical path, is a ratio of them. Words do not depend on a tokenizer. All figures:",
        f"`{STATISTICS}`.",
    ]
    for split, part in summary["splits"].items():
        lines += ["", f"**{split}**: {part['rows']} rows, {part['rows_with_blocks']} of them with blocks.", ""]
        lines += ["| of a document | least | median | mean | most |", "|---|---|---|---|---|"]
        for name, label in names.items():
            spread = part["measures"][name]
            figures = " | ".join(_figure(spread[each]) for each in ("min", "median", "mean", "max"))
            lines.append(f"| {label} | {figures} |")
        lines += ["", "| part of parallel documents | words | tokens |", "|---|---|---|"]
        for kind in _KINDS:
            lines.append(f"| {kind} | {part['words_by_kind'][kind]} | {part['tokens_by_kind'][kind]} |")
    return lines


def _figure(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _dropped(summary: Mapping[str, Any], reader: ExampleReader) -> list[str]:
    lines = ["## What was dropped", "", "| source | rows read | kept |", "|---|---|---|"]
    lines += [f"| {name} | {counts['rows']} | {counts['kept']} |" for name, counts in summary["sources"].items()]
    if not reader.dropped:
        return [*lines, "", "Every row passed the check of its document."]
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary["dropped"].items())
    lines += ["", f"Dropped: {reasons}. Each with its line and reason: `{DROPPED}`. The first:", ""]
    entries = [_entry(entry).replace("`", "'") for entry in reader.dropped[:5]]
    return lines + [f"- `{entry}`" for entry in entries]


def _entry(entry: Mapping[str, Any]) -> str:
    """Return in one line which row was dropped and why."""
    detail = " ".join(entry["detail"].split())
    detail = detail if len(detail) <= 200 else detail[:197] + "..."
    return f"{entry['source']}, line {entry['line']}: {entry['reason']}: {detail}"


def _columns() -> list[str]:
    lines = ["## Columns", "", "| column | type | in | what |", "|---|---|---|---|"]
    for name, (dtype, description) in COLUMNS.items():
        configs = ", ".join(config for config, columns in CONFIGS.items() if name in columns)
        lines.append(f"| `{name}` | {dtype} | {configs} | {description} |")
    return lines
