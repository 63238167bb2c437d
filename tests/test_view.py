"""What ``multiverse view`` shows is what the layout says, and its page is one file in which text stays text."""

import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Page, open_browser
from helpers import slow_unless
from hypothesis import given
from hypothesis import strategies as st
from test_real_documents import SAMPLES, tokenizer_of_samples
from test_recipe import ROOT, block, documents
from test_records import DOCUMENT, tokenizer
from transformers import AutoTokenizer

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt
from multiverse_hf.cli import run
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX
from multiverse_hf.evaluation.samples import Sample, SampleStore
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.viewing.page import html_page, view_data
from multiverse_hf.viewing.results import ViewedResult, find_results
from multiverse_hf.viewing.trace import TraceBuilder, token_texts

pytestmark = pytest.mark.usefixtures("unquiet")
NESTED = documents(1)[0]["document"]  # two paths, the first with two of its own
OWN = ROOT / "recipes/own-documents/documents.jsonl"
HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
NPR = (
    "<guideline><plan>1: a</plan><plan>2: b</plan></guideline><step>1: x</step><step>2: y</step><takeaway>z</takeaway>"
)


def builder(of: Any = None) -> TraceBuilder:
    of = of or tokenizer()
    return TraceBuilder(of, TagSet.from_tokenizer(of), "tiny")


def trace_of(text: str, of: Any = None) -> dict[str, Any]:
    return builder(of).build(ViewedResult("here", "one", text))


def items_of(items: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Return the runs of tokens of a tree, in document order."""
    found = []
    for item in items:
        if item["kind"] == "block":
            found += items_of(item["goal"])
            for path in item["paths"]:
                found += items_of(path["items"])
        else:
            found.append((item["start"], item["stop"]))
    return found


# The data, against the layout


@pytest.mark.parametrize("text", [NESTED, DOCUMENT, "Because.", NESTED[:-60], f"{NESTED}\n{NESTED}", "</Path> <Goal>"])
def test_positions_and_sight_are_those_of_the_layout(text: str) -> None:
    check_layout(trace_of(text), text, tokenizer())


@pytest.mark.skipif(not SAMPLES, reason="../shared/data/multiverse-1k-samples is not here")
@pytest.mark.parametrize("path", slow_unless(SAMPLES[4:5], SAMPLES), ids=lambda path: path.stem)
def test_real_documents_are_shown_as_the_layout_has_them(path: Path) -> None:
    trace = trace_of(path.read_text(), tokenizer_of_samples())
    check_layout(trace, path.read_text(), tokenizer_of_samples())
    assert trace["notes"] == []
    assert trace["stats"]["num_paths"] == path.read_text().count("<Path>")


def check_layout(trace: dict[str, Any], text: str, of: Any) -> None:
    ids = of.encode(text, add_special_tokens=False)
    layout = build_layout(ids, TagSet.from_tokenizer(of))
    assert "".join(trace["tokens"]["text"]) == text
    positions, owners = [], []
    for number, segment in enumerate(trace["segments"]):
        count = segment["stop"] - segment["start"]
        positions += range(segment["position"], segment["position"] + count)
        owners += [number] * count
    assert positions == layout.position_ids.tolist()
    assert trace["stats"]["length"] == layout.length
    sees = torch.zeros(len(trace["segments"]), len(trace["segments"]), dtype=torch.bool)
    for number, segment in enumerate(trace["segments"]):
        for first, last in segment["sees"]:
            sees[number, first : last + 1] = True
    shown = torch.ones(len(ids), len(ids), dtype=torch.bool).tril_() & sees[owners][:, owners]
    assert torch.equal(shown, layout.mask())
    runs = items_of(trace["tree"])  # every token is in one place of the tree
    assert [index for start, stop in runs for index in range(start, stop)] == list(range(len(ids)))


def test_branches_have_their_names_outlines_rows_and_waits() -> None:
    trace = trace_of(NESTED)
    found = [(each["name"], each["title"], each["parent"], each["row"]) for each in trace["branches"]]
    # the nested block takes the rows below its path; path 2 comes under them
    assert found == [
        ("", "", None, 0),
        ("1", "part 1", 0, 1),
        ("1.1", "part 1", 1, 2),
        ("1.2", "part 2", 1, 3),
        ("2", "part 2", 0, 4),
    ]
    # path 2 is short, and waits for path 1
    assert [each["waits_for"] for each in trace["branches"]].count(None) >= 3
    assert trace["branches"][4]["waits_for"] == 1
    longest = [each["name"] for each in trace["branches"] if each["critical"]]
    inner = max(trace["branches"][2:4], key=lambda each: each["position"][1])
    assert longest == ["", "1", inner["name"]]
    assert all(each["step"][1] <= each["reduce"][1] for each in trace["branches"])
    assert any(each["step"][1] < each["reduce"][1] for each in trace["branches"])  # path 2 waits for path 1


@functools.cache
def embedded() -> tuple[Any, Any]:
    path = embedded_model()
    return MultiverseForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("prompt", ["A=19-7+12; B=8+15-3; C=5+6; total?", "(A=5+6; B=7+8) (C=9-2; D=4+4) total?"])
def test_steps_are_those_in_which_the_engine_wrote(prompt: str) -> None:
    model, words = embedded()
    written, step = [], -1  # the pass over the prompt is step 0

    def count(*_: object) -> None:
        nonlocal step
        step += 1

    class Recorder:
        def on_event(self, event: Any) -> None:
            if event.kind == "token" and event.token != words.eos_token_id:
                written.append((event.branch, step, event.token, event.sampled))

    hook = model.base_model.register_forward_hook(count)
    ids = encode_prompt(words, f"{prompt} {PARALLEL_SUFFIX}", return_tensors="pt")
    output = model.generate(ids, max_new_tokens=1024, streamer=Recorder(), return_dict_in_generate=True)
    hook.remove()
    stats = output.stats[0]
    assert stats.num_forks
    answer = output.sequences[0, ids.shape[1] : ids.shape[1] + stats.num_tokens].tolist()
    text = words.decode([token for token in answer if token != words.eos_token_id])
    trace = trace_of(text, words)
    forced = {index for first, last in trace["tokens"]["forced"] for index in range(first, last + 1)}
    shown = []
    for segment in trace["segments"]:
        for index in range(segment["start"], segment["stop"]):
            name = trace["branches"][segment["branch"]]["name"]
            shown.append((name, trace["tokens"]["step"][index], answer[index], index not in forced))
    assert sorted(shown) == sorted(written)
    assert trace["stats"]["num_steps"] == stats.num_steps  # the end token takes the last step, and the prompt none


def test_a_family_of_other_tags_is_recognized() -> None:
    trace = trace_of(NPR)
    assert [each["name"] for each in trace["branches"]] == ["", "1", "2"]
    assert trace["notes"] == []


@given(st.text(min_size=1, max_size=40))
def test_tokens_join_to_the_text_whatever_it_holds(text: str) -> None:
    ids = tokenizer().encode(text, add_special_tokens=False)
    texts = token_texts(ids, tokenizer())
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer().decode(ids)


def test_counts_of_another_tokenizer_and_waiting_paths_are_told() -> None:
    counts = {"num_tokens": 7}
    (note,) = builder().build(ViewedResult("here", "one", DOCUMENT, counts=counts))["notes"]
    assert "counted 7 tokens" in note
    assert "--model" in note
    trace = trace_of(DOCUMENT)["stats"]
    counts = {"num_tokens": trace["num_tokens"] + 1, "num_steps": trace["num_steps"]}
    assert builder().build(ViewedResult("here", "one", DOCUMENT, counts=counts))["notes"] == []
    (note,) = builder().build(ViewedResult("here", "one", DOCUMENT, counts=counts | {"num_steps": 500}))["notes"]
    assert "500 steps" in note


# The files


def sample(**given: Any) -> Sample:
    base = {"task": "mv:chains", "id": "7", "group": None, "sample": 0, "seed": 1, "prompt": "What?"}
    base |= {"document": DOCUMENT, "gold": "2", "answer": "2", "correct": True, "rule": "chains"}
    base |= {"well_formed": True, "num_tokens": 90, "length": 70, "parallelism": 1.3, "num_steps": 60}
    base |= {"num_forks": 1, "max_width": 2, "depth": 1, "num_closed": 0, "malformed": 0}
    return Sample(**(base | {"finish_reason": "stop", "seconds": 0.5} | given))


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ANSWER = {
    "prompt": "Why?",
    "document": DOCUMENT,
    "text": "x",
    "answer": "2",
    "seconds": 0.1,
    "model": "multiverse-tiny",
}
ANSWER |= {"stats": {"num_tokens": 90, "length": 70, "parallelism": 1.3, "num_steps": 60, "finish_reason": "stop"}}
CHAT = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": DOCUMENT}]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("answer.json", json.dumps(ANSWER)),
        ("answer", json.dumps(ANSWER) + "\n"),
        ("answers.jsonl", json.dumps({"id": 3, "error": None} | ANSWER) + "\n"),
        ("answers", json.dumps(ANSWER) + "\n" + json.dumps(ANSWER) + "\n"),
        ("rows.jsonl", json.dumps({"messages": CHAT}) + "\n"),
        ("rows.json", json.dumps([{"prompt": CHAT[:1], "completion": CHAT[1:]}])),
        ("rows.csv", f'prompt,document\r\nWhy?,"{DOCUMENT}"\r\n'),
        ("document.xml", DOCUMENT),
        ("windows.txt", "\ufeff" + DOCUMENT.replace("\n", "\r\n")),
    ],
)
def test_results_rows_and_documents_are_read(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    results, _ = find_results([str(path)])
    assert {result.document for result in results} == {DOCUMENT}
    assert {result.prompt for result in results} == {None if name in ("document.xml", "windows.txt") else "Why?"}
    if "answer" in name:
        assert results[0].counts["num_steps"] == 60
        assert results[0].facts["model"] == "multiverse-tiny"


def test_parquet_and_folders_of_a_batch_and_of_an_evaluation_are_read(tmp_path: Path) -> None:
    run_folder, batch = tmp_path / "run", tmp_path / "batch"
    with SampleStore(run_folder / "samples") as store:
        store.add(sample())
    batch.mkdir()
    write_lines(batch / "answers.jsonl", {"id": "7", "error": None} | ANSWER)
    for source in (run_folder, run_folder / "samples", run_folder / "samples/00000.parquet", batch):
        ((result,), has_more) = find_results([str(source)])
        assert (result.document, has_more) == (DOCUMENT, False)
    (result,), _ = find_results([str(run_folder)])
    assert result.title == "mv:chains 7 answer 1"
    assert (result.facts["correct"], result.facts["gold"], result.counts["num_tokens"]) == (True, "2", 90)


def test_answers_to_one_problem_from_two_runs_stand_beside_each_other(tmp_path: Path) -> None:
    for name, ids in (("a", "123"), ("b", "321")):
        with SampleStore(tmp_path / name / "samples") as store:
            for each in ids:
                store.add(sample(id=each))
    results, has_more = find_results([str(tmp_path / "a"), str(tmp_path / "b")], limit=2)
    assert [(Path(result.source).name, json.loads(result.key)[1]) for result in results] == [
        ("a", "1"), ("b", "1"), ("a", "2"), ("b", "2"),
    ]  # fmt: skip
    assert has_more
    (one, other), _ = find_results([str(tmp_path / "a"), str(tmp_path / "b")], row_id="3")
    assert one.key == other.key


def test_two_answers_to_one_prompt_belong_together_whatever_form_was_asked_for(tmp_path: Path) -> None:
    rows = [ANSWER | {"prompt": f"Why? {suffix}"} for suffix in (PARALLEL_SUFFIX, SEQUENTIAL_SUFFIX)]
    path = write_lines(tmp_path / "rows.jsonl", rows[0], ANSWER | {"prompt": "Who?"}, rows[1])
    results, _ = find_results([str(path)])
    assert [result.prompt.split("?")[0] for result in results] == ["Why", "Why", "Who"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["is empty"]),
        (b" \n ", ["is empty"]),
        (b"\xff\xfeabc", ["not UTF-8", "byte 0", "convert"]),
        (b'{"prompt": "x", "docu', ["no JSON", "cut off"]),
        (b'{"prompt": "x"}', ["no document", "prompt"]),
        (b'{"document": " "}', ["no document"]),
        (b'{"document": 7}', ["no document"]),
        (b"[[1]]", ["[1]", "not an object"]),
        (b'{"document": "x"}\n{"a": ', ["line 2", "no JSON"]),
        (b'{"document": "\\ud800"}', ["surrogate"]),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_line(
    data: bytes, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "file.jsonl").write_bytes(data)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    for source in ("file", "-", *(["file.jsonl"] if b"\n{" not in data else [])):
        assert run(["view", source]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        if source != "file.jsonl":
            assert all(word in error for word in words), error
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.xml"], ["no file or folder nothing.xml"]),
        (["rows.jsonl", "--line", "9"], ["no line or row 9"]),
        (["rows.jsonl", "--id", "z"], ["no row with id 'z'"]),
        (["rows.jsonl", "--png", "x.svg"], ["--png", ".png"]),
        (["page.html", "--output", "page.html"], ["replace its own source"]),
        (["compared"], ["two runs"]),
        (["-", "-"], ["twice"]),
    ],
)
def test_bad_usage_is_told_in_a_line(
    arguments: list[str], words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "rows.jsonl", ANSWER)
    (tmp_path / "page.html").write_text(DOCUMENT)
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared/comparison.json").write_text("{}")
    assert run(["view", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


def test_a_document_that_is_cut_off_is_shown_with_one_line_about_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.xml").write_text(DOCUMENT[: DOCUMENT.index("goes right")])
    assert run(["view", "cut.xml"]) == 0
    done = capfd.readouterr()
    assert done.out == "cut.html\n"
    assert done.err.count("\n") == 1
    assert "does not parse" in done.err
    assert "end of the text" in done.err


def test_a_row_without_an_answer_is_shown_with_its_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "answers.jsonl", {"id": 1, "prompt": "x", "document": None, "error": "too long"})
    (result,), _ = find_results([str(path)])
    trace = builder().build(result)
    assert (trace["error"], trace["tokens"]["text"], trace["tree"]) == ("too long", [], [])
    assert len(trace["branches"]) == 1


# The page


def data_of(page: str) -> dict[str, Any]:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def test_the_page_is_one_file_without_a_network_and_text_in_it_is_no_markup() -> None:
    text = f"{HOSTILE}<!-- {{{{script}}}} \u2028 & \x1b[31m\u202e {NESTED}"
    data = view_data([trace_of(text)], HOSTILE)
    page = html_page(data)
    assert data_of(page) == data
    assert page == html_page(view_data([trace_of(text)], HOSTILE))  # the same results give the same bytes
    empty = html_page(view_data([], ""))
    assert len(empty.encode()) < 300_000
    assert not re.search(r"https?:|//[a-z]|@import|url\(|src=|<link", empty)
    assert page.count("</script>") == empty.count("</script>") == 2
    assert "<img" not in page
    assert page.count("<script") == 2


def test_view_writes_a_page_named_after_its_file_and_pictures(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    rows = [ANSWER | {"document": NESTED.replace("part 1", "cost $x_1$ <b>")}, ANSWER]
    write_lines(tmp_path / "rows.jsonl", *(row | {"stats": {}} for row in rows))
    assert run(["view", "rows.jsonl", "--png", "a.png", "--svg", "b.svg"]) == 0
    assert capfd.readouterr() == ("a.png\nb.svg\nrows.html\n", "")
    assert len(data_of(Path("rows.html").read_text())["results"]) == 2
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    first = Path("b.svg").read_text()
    assert run(["view", "rows.jsonl", "--svg", "b.svg", "--line", "1"]) == 0
    assert first != Path("b.svg").read_text()
    assert run(["view", "rows.jsonl", "--svg", "b.svg"]) == 0
    assert first == Path("b.svg").read_text()


@pytest.mark.slow
def test_log_probabilities_are_those_of_one_pass_over_the_document(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompt = f"A=5+6; B=7+8; total? {PARALLEL_SUFFIX}"
    assert run(["generate", prompt, "--json", "--greedy"]) == 0
    (tmp_path / "answer.json").write_text(capfd.readouterr().out)
    assert run(["view", str(tmp_path / "answer.json"), "--logprobs", "--json"]) == 0
    (trace,) = json.loads(capfd.readouterr().out)["results"]
    assert trace["notes"] == []
    found = trace["tokens"]["logprob"]
    forced = {index for first, last in trace["tokens"]["forced"] for index in range(first, last + 1)}
    assert {index for index, score in enumerate(found) if score is None} == forced
    # greedy: every chosen token is the likeliest, and this model is sure of most
    assert min(score for score in found if score is not None) > -1.5
    assert sum(score > -0.1 for score in found if score is not None) > 0.9 * (len(found) - len(forced))


# In a browser

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with open_browser() as page:
        yield page


def opened(browser: Page, folder: Path, traces: list[dict[str, Any]], title: str = "one", **options: Any) -> Page:
    path = folder / "page.html"
    path.write_text(html_page(view_data(traces, title)), encoding="utf-8")
    browser.errors.clear()
    browser.open(path, **options)
    return browser


@needs_browser
def test_the_page_is_searched_folded_and_driven_by_keyboard(browser: Page, tmp_path: Path) -> None:
    text = NESTED.replace("Nothing else.", f"Nothing else. {HOSTILE} {'x' * 5000}")
    trace = trace_of(text)
    page = opened(browser, tmp_path, [trace])
    assert page.run("document.title") == "one"  # what the text spells did not run
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("[...document.querySelectorAll('.lane .chip')].map(e => e.textContent)") == [
        "1",
        "1.1",
        "1.2",
        "2",
    ]
    assert page.run("[...document.querySelectorAll('.conclusion-box')].map(e => e.innerText.trim())") == ["done"] * 2
    # a long word leaves no lane
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    # search
    page.press("/")
    for letter in "NOTHING":
        page.press(letter)
    page.press("Enter")
    assert page.run("document.getElementById('hits').textContent") == "1 / 1"
    assert page.run("String([...CSS.highlights.get('hit-now')][0])") == "Nothing"
    page.press("Escape")
    # fold
    page.press("f")
    assert page.run("document.querySelectorAll('details.lane[open]').length") == 0
    page.press("f")
    assert page.run("document.querySelectorAll('details.lane[open]').length") == 4
    # along the timeline: the second token, and what it sees
    page.run("document.querySelector('canvas').focus()")
    page.press("ArrowRight", "ArrowRight")
    assert page.run("document.querySelector('canvas').ariaValueNow") == "2"
    page.press("End", "ArrowDown")
    at = int(page.run("document.querySelector('canvas').ariaValueNow")) - 1
    branch = next(each["branch"] for each in trace["segments"] if each["start"] <= at < each["stop"])
    assert trace["branches"][branch]["row"] > 0
    said = page.run("document.getElementById('details').innerText")
    assert f"path {trace['branches'][branch]['name']}" in said
    assert f"step {trace['tokens']['step'][at]}" in " ".join(said.split())
    page.press("Escape", "t")
    assert "<Parallel>" in page.run("document.querySelector('.answer').innerText")
    assert page.errors == []


@needs_browser
def test_a_bar_selects_its_text_and_the_text_its_bar(browser: Page, tmp_path: Path) -> None:
    trace = trace_of(NESTED)
    page = opened(browser, tmp_path, [trace])
    lane = "[...document.querySelectorAll('.lane')].find(e => e.querySelector('.chip').textContent === '2')"
    x, y = page.run(
        f"(() => {{const text = {lane}.querySelector('.run.text'), range = document.createRange();"
        "range.selectNodeContents(text); const box = range.getClientRects()[0];"
        "return [box.left + 12, box.top + box.height / 2]})()"
    )
    page.click(x, y)
    value = int(page.run("document.querySelector('canvas').ariaValueNow")) - 1
    own = next(each for each in trace["segments"] if each["branch"] == 4)
    assert own["start"] <= value < own["stop"]
    # what the token does not see is dimmed: path 1 with all that is nested in it, and what comes after
    seen = {number for first, last in own["sees"] for number in range(first, last + 1)}
    assert page.run("document.querySelectorAll('.lane.here').length") == 1
    assert page.run(f"{lane}.querySelectorAll('.flow .unseen').length") == 0
    assert page.run("document.querySelectorAll('.lane .flow .unseen').length") > 0
    assert len(seen) < len(trace["segments"])
    # and back: the first bar of the answer itself
    left, top = page.run("(() => {const box = document.querySelector('canvas').getBoundingClientRect();"
                         "return [box.left + 6, box.top + 20 + 12]})()")  # fmt: skip
    page.click(left, top)
    assert page.run("document.querySelector('canvas').ariaValueNow") == "1"
    assert page.run("document.querySelectorAll('.lane.here').length") == 0
    assert page.errors == []


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 800, 1600])
def test_nothing_leaves_the_window_at_any_width(browser: Page, tmp_path: Path, width: int, dark: bool) -> None:
    traces = [builder().build(ViewedResult("a", name, NESTED, "Why?", key="k")) for name in ("first", "second")]
    page = opened(browser, tmp_path, traces, HOSTILE, width=width, dark=dark)
    assert page.run("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("document.querySelectorAll('.result').length") == (1 if width <= 900 else 2)
    assert page.errors == []


@needs_browser
@pytest.mark.slow
def test_forty_thousand_tokens_in_three_hundred_branches_are_drawn(browser: Page, tmp_path: Path) -> None:
    paths = [f"{number}: {'some words of a long path ' * 6}" for number in range(30)]
    text = "\n".join(f"Look {number}.\n{block(paths)}" for number in range(10))
    trace = trace_of(text)
    assert trace["stats"]["num_tokens"] > 40_000
    assert trace["stats"]["num_paths"] == 300
    page = opened(browser, tmp_path, [trace])
    assert page.run("document.querySelectorAll('.lane').length") == 300
    # the text has no element for each token
    assert page.run("document.querySelectorAll('*').length") < 10_000
    page.run("document.querySelector('canvas').focus()")
    page.press("ArrowRight", "End", "Enter")
    assert page.run("document.querySelector('canvas').ariaValueNow") == str(trace["stats"]["num_tokens"])
    assert page.run("scrollY") > 1000
    assert page.errors == []
