"""``multiverse view``: results as one page for a browser, with their branches side by side and on an axis of time."""

import sys
import webbrowser
from pathlib import Path
from typing import Annotated, Any

import typer

from multiverse_hf.checkpoints import EMBEDDED_NAMES, Attention, Dtype, load_model, open_checkpoint, quiet
from multiverse_hf.cli.inspect import load_tokenizer
from multiverse_hf.cli.options import JsonOption, TracebackOption, print_json
from multiverse_hf.cli.terminal import waiting
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError
from multiverse_hf.outputs import check_output, write_output

MAX_PICTURES = 8  # timelines in one picture


def view(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="FILE|FOLDER...", help="Results, rows or a document; - reads standard input."),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page; by default named after the first file, here.")
    ] = None,
    line: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only this line of a JSONL file, or row of a table.")
    ] = None,
    row_id: Annotated[str | None, typer.Option("--id", metavar="ID", help="Only rows with this id.")] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="Most results of each file.")] = 20,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="PATH", help="Model with the tokenizer; by default multiverse-tiny."),
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="Read the documents with the model: show how likely each token was.")
    ] = False,
    suffix: Annotated[
        Suffix,
        typer.Option(metavar="KIND", help="What prompts without it end with then: parallel, sequential or none."),
    ] = Suffix.PARALLEL,
    png: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write the timelines as a picture.")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="The same as vectors.")] = None,
    opens: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: JsonOption = False,
    traceback: TracebackOption = False,
) -> None:
    """Show results in a browser: branches side by side, who wrote when, and what each token sees.

    The page is one file and needs no network. It shows answers of generate, folders of eval, rows of a dataset, and
    bare documents. Of several files, answers to one problem stand beside each other.

    \b
    Examples:
      multiverse generate "A=19-7+12; B=8+15-3; total?" --json | multiverse view - --open
      multiverse view out/answers.jsonl --line 3
      multiverse view runs/autoregressive runs/parallel --output comparison.html
      multiverse view document.xml --model Qwen/Qwen2.5-7B --svg timeline.svg
    """
    pictures = {".png": png, ".svg": svg}
    page = _page_path(sources, output)
    for path in () if as_json else (page,):
        check_output(path)
    for ending, path in pictures.items():
        if path is not None and path.suffix != ending:
            raise CommandError(f"--{ending[1:]} {path} must end with {ending}; rename it")
        if path is not None:
            check_output(path)
    from multiverse_hf.viewing.results import find_results

    results, has_more = find_results(sources, line, row_id, limit)
    with waiting("loading the tokenizer"):
        quiet()
        from multiverse_hf.viewing.page import html_page, view_data
        from multiverse_hf.viewing.trace import TraceBuilder

        of_result = [model or _known_model(result.facts.get("model")) for result in results]
        builders = {}
        for name in dict.fromkeys(of_result):
            tokens, scores = load_tokenizer(name), _reader(name, suffix) if logprobs else None
            builders[name] = TraceBuilder(tokens.tokenizer, tokens.tags, name or EMBEDDED_NAMES[0], scores)
    with waiting("laying out the documents"):
        traces = [builders[name].build(result) for name, result in zip(of_result, results, strict=True)]
    for trace in traces:
        for note in trace["notes"]:
            print(f"note: {trace['title']}: {note}", file=sys.stderr)
    if has_more:
        print(f"note: the first {limit} results of each file; --limit, --line or --id choose others", file=sys.stderr)
    asked = [path for path in pictures.values() if path is not None]
    if asked:
        if len(traces) > MAX_PICTURES:
            raise CommandError(f"a picture holds at most {MAX_PICTURES} timelines, got {len(traces)}; add --limit 1")
        from multiverse_hf.viewing.picture import draw_timelines

        draw_timelines(traces, asked)
    title = traces[0]["title"] if len(traces) == 1 else f"{len(traces)} results"
    data = view_data(traces, title)
    if as_json:
        print_json(data)
        return
    write_output(page, html_page(data))
    for path in (*asked, page):
        print(path)
    if opens and not webbrowser.open(page.resolve().as_uri()):
        raise CommandError(f"no browser was found; open {page} yourself", 1)


def _page_path(sources: list[str], output: Path | None) -> Path:
    """Return the page's path: by default the first source's name, in the working folder."""
    if output is None:
        name = "view" if sources[0] == "-" else Path(sources[0]).resolve().stem or "view"
        output = Path(f"{name}.html")
    if any(source != "-" and output.resolve() == Path(source).resolve() for source in sources):
        raise CommandError(f"the page {output} would replace its own source; name another with --output")
    if sources.count("-") > 1:
        raise CommandError("- stands twice; standard input can be read once")
    return output


def _known_model(name: Any) -> str | None:
    """Return the name of a result's model if its tokenizer is on this machine, else None."""
    return name if isinstance(name, str) and (name in EMBEDDED_NAMES or Path(name).is_dir()) else None


def _reader(model: str | None, suffix: Suffix) -> Any:
    """Return a function from a result and its document's ids to the log-probability of each token."""
    import torch

    checkpoint = open_checkpoint(model)
    loaded = load_model(checkpoint, Dtype.AUTO, Attention.SDPA, "auto", None)

    def read(result: Any, ids: list[int]) -> list[float | None]:
        messages = list(result.messages) or [{"role": "user", "content": result.prompt or ""}]
        if messages[-1]["role"] == "user" and messages[-1]["content"]:
            messages[-1] = {**messages[-1], "content": suffix.end(messages[-1]["content"])}
        begin = checkpoint.encode(messages) if result.prompt else []
        row = torch.tensor([[*begin, *ids]], device=loaded.device)
        with torch.no_grad():
            logits = loaded(row).logits[0, :-1].float()
        found = logits.log_softmax(dim=-1).gather(1, row[0, 1:, None])[:, 0].tolist()
        return found[len(begin) - 1 :] if begin else [None, *found]

    return read
