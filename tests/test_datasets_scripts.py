"""Datasets as a user builds, publishes and loads them: real processes, real folders, real HTTP."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="datasets need the train extra: pip install -e '.[train]'")
pytest.importorskip("matplotlib", reason="the card's plots need the train extra: pip install -e '.[train]'")

from hub import TOKEN, read_log
from test_recipe import block, call

from multiverse_hf.checkpoints import EMBEDDED
from multiverse_hf.data.curriculum import PAPER_SHARES
from multiverse_hf.data.examples import Example, split_examples
from multiverse_hf.data.folders import CONFIGS, plan_passes
from multiverse_hf.data.records import Form, read_record
from multiverse_hf.documents import parse_document
from multiverse_hf.errors import CommandError
from multiverse_hf.outputs import new_folder

pytestmark = pytest.mark.usefixtures("unquiet")

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "datasets_scripts"
SAMPLES = sorted((ROOT.parent / "shared/data/multiverse-1k-samples").glob("*.xml"))


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")} | more


def run(script: str | Path, *arguments: str | Path, cwd: Path, code: int = 0, **more: str) -> str:
    """Run a script in a process of its own and give what it says."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=1800)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON lines; text stands as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def published(number: int, document: str | None = None, **more: Any) -> dict[str, Any]:
    """A row in the columns of Multiverse-1K."""
    work = block([f"{number} is {'odd' if number % 2 else 'even'}", "nothing else"])
    return {
        "question": f"What of {number}?",
        "deepseek_thinking_trajectory_parallel": document or f"<Think>\n{work}\nSo much.\n</Think>",
        "deepseek_attempt": f"It is {number}.",
        "source_type": "tests",
    } | more


def load(folder: Path, config: str | None = None, split: str = "train") -> list[dict[str, Any]]:
    from datasets import load_dataset

    return list(load_dataset(str(folder), config, split=split, streaming=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str | Path) -> int:
    return call(monkeypatch, f"datasets_scripts/{script}", *map(str, arguments))


# Building


@pytest.mark.slow
def test_three_kinds_of_sources_become_three_configs_of_the_same_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    curated = [
        {"id": "mine", "prompt": "2*3+4*5?", "document": block(["6", "20"]) + "\nSo 26.", "answer": 26},
        {"prompt": "1+1? Think step by step before answering.", "document": "<Think>\n2\n</Think>\n\nAnswer: 2"},
        {"prompt": "What of 8?", "document": block(["a", "b"]), "answer": "8", "provenance": {"b": 1, "a": [2]}},
    ]
    rows = [published(number, deepseek_thinking_trajectory_sequential=f"{number}, as written.") for number in range(6)]
    rows[0]["deepseek_thinking_trajectory_sequential"] = None
    s1k = [{"question": " What of\n3? ", "deepseek_thinking_trajectory": "Let me see. 3 it is.", "solution": "x"}]
    sources = [
        *("--curated", write_rows(tmp_path / "curated.jsonl", curated)),
        *("--published", write_rows(tmp_path / "published.jsonl", rows)),
        *("--s1k", write_rows(tmp_path / "s1k.jsonl", s1k)),
    ]
    out = tmp_path / "built"
    assert build(monkeypatch, "build_multiverse_1k.py", *sources, "--license", "mit", "--output", out) == 0

    from datasets import get_dataset_config_names, get_dataset_default_config_name, get_dataset_split_names

    assert get_dataset_config_names(str(out)) == list(CONFIGS)
    assert get_dataset_default_config_name(str(out)) == "multiverse"
    assert get_dataset_split_names(str(out), "mixed") == ["train", "test"]
    parallel = {row["id"]: row for split in ("train", "test") for row in load(out, "multiverse", split)}
    sequential = {row["id"]: row for split in ("train", "test") for row in load(out, "autoregressive", split)}
    assert sorted(parallel) == sorted(sequential)
    assert len(parallel) == 9
    assert len(load(out, "multiverse", "test")) == 1  # the least there can be: 5 % of 9 prompts is less than one
    assert load(out) == load(out, "multiverse")

    mine = parallel["mine"]
    assert mine["prompt"] == "2*3+4*5?"
    assert mine["answer"] == "26"
    assert mine["document"] == f"<Think>\n{block(['6', '20'])}\nSo 26.\n</Think>\n\nAnswer: 26"
    assert (mine["num_blocks"], mine["num_paths"], mine["depth"]) == (1, 2, 1)
    assert mine["parallelism"] == mine["num_tokens"] / mine["length"] > 1
    assert sequential["mine"]["document"] == "<Think>\n6\n20\nSo 26.\n</Think>\n\nAnswer: 26"
    assert parallel["curated-00002"]["prompt"] == "1+1?", "without a sentence of record"
    assert parallel["curated-00003"]["provenance"] == '{"a": [2], "b": 1}'
    origins = {name: row["sequential_from"] for name, row in sequential.items()}
    assert origins["published-00001"] == origins["mine"] == "document"
    assert origins["published-00002"] == "published"
    assert origins["published-00004"] == "s1K-1.1"
    of_s1k = sequential["published-00004"]
    assert of_s1k["document"] == "<Think>\nLet me see. 3 it is.\n</Think>\n\nAnswer: It is 3."
    assert json.loads(parallel["published-00004"]["provenance"]) == {"source_type": "tests"}
    for row in (*parallel.values(), *sequential.values(), *load(out, "mixed")):
        assert read_record(row).document.render() == row["document"], "the recipe adds nothing to it"


def test_mixed_reads_every_row_once_in_each_of_the_papers_eight_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = write_rows(tmp_path / "rows.jsonl", [published(number) for number in range(20)])
    options = ["--published", source, "--license", "mit", "--test-share", "0", "--output", tmp_path / "built"]
    assert build(monkeypatch, "build_multiverse_1k.py", *options) == 0
    rows = load(tmp_path / "built", "mixed")
    assert [row["epoch"] for row in rows] == [epoch for epoch in range(8) for _ in range(20)]
    for epoch, share in enumerate(PAPER_SHARES):
        of_epoch = [row for row in rows if row["epoch"] == epoch]
        assert len({row["id"] for row in of_epoch}) == 20
        assert sum(row["form"] == "parallel" for row in of_epoch) == share * 20
    for row in rows:
        is_parallel = row["form"] == "parallel"
        assert ("<Parallel>" in row["document"]) == is_parallel
        assert row["prompt"].endswith("Think step by step and in parallel before answering.") == is_parallel
    with pytest.raises(ValueError, match="test"):
        load(tmp_path / "built", "multiverse", "test")


def test_a_corrupted_row_is_dropped_with_its_line_and_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    whole = published(4)["deepseek_thinking_trajectory_parallel"]
    rows = [
        published(1),
        "{half of a row",
        "",
        published(2, whole.replace("</Path>", "", 1)),
        published(3, deepseek_thinking_trajectory_sequential=block(["it", "has", "blocks"])),
        published(1),
        {"question": "Where is the rest?"},
        published(4, id="last"),
        published(5, id="last"),
        ["not", "an", "object"],
    ]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--published", source, "--license", "mit", "--output", tmp_path / "built"]
    assert build(monkeypatch, "build_multiverse_1k.py", *options) == 0
    lines = (tmp_path / "built/dropped_rows.jsonl").read_text().splitlines()
    dropped = {entry["line"]: entry for entry in map(json.loads, lines)}
    assert {line: entry["reason"] for line, entry in dropped.items()} == {
        2: "unreadable",
        4: "malformed document",
        5: "malformed document",
        6: "duplicate",
        7: "wrong columns",
        9: "duplicate",
        10: "unreadable",
    }
    # <Think>, <Parallel>, <Goal>, two outlines, </Goal>, <Path>, its text, the line that closed it, the second <Path>
    assert dropped[4]["detail"].startswith("at its line 10, column 1: found <Path>, expected <Parallel> or </Path>")
    assert "deepseek_thinking_trajectory_parallel" in dropped[7]["detail"]
    assert all(entry["source"] == "rows.jsonl" for entry in dropped.values())
    said = capsys.readouterr().out
    assert "7 dropped" in said
    assert "rows.jsonl, line 4: malformed document: at its line 10, column 1" in said
    card = (tmp_path / "built/README.md").read_text()
    assert "2 duplicate, 2 malformed document, 2 unreadable, 1 wrong columns" in card
    assert "| rows.jsonl | 9 | 2 |" in card


@pytest.mark.skipif(not SAMPLES, reason="../shared/data/multiverse-1k-samples is not here")
@pytest.mark.slow
def test_the_published_documents_build_and_the_recipe_keeps_every_row(tmp_path: Path) -> None:
    documents = [path.read_text() for path in SAMPLES]
    rows = [published(number, document) for number, document in enumerate(documents)]
    rows.append(published(99, documents[0].replace("</Goal>", "", 1)))
    source = write_rows(tmp_path / "published.jsonl", rows)
    said = run(
        *("build_multiverse_1k.py", "--published", source, "--license", "mit", "--output", "built"), cwd=tmp_path
    )
    count = len(documents)
    assert f"built: {count - 1} train, 1 test rows, 1 dropped" in said
    assert f"published.jsonl, line {count + 1}: malformed document: at its line " in said
    built = load(tmp_path / "built", "multiverse") + load(tmp_path / "built", "multiverse", "test")
    attempt = "\n\nAnswer: It is {}."
    assert {row["document"] for row in built} == {
        document.rstrip() + attempt.format(number) for number, document in enumerate(documents)
    }
    for row in built:
        parsed = parse_document(row["document"])
        assert (row["num_blocks"], row["num_paths"]) == (len(list(parsed.blocks())), parsed.num_paths)
        assert row["parallelism"] > 1
    recipe = ["--config", ROOT / "recipes/tiny-random/sft_lora.yaml", "--model_name_or_path", EMBEDDED]
    recipe += ["--dataset_name", "built", "--dataset_config", "multiverse", "--dataset_test_split", "test"]
    recipe += ["--max_length", "100000", "--output_dir", "out", "--check_rows"]
    said = run(ROOT / "recipes/sft.py", *recipe, cwd=tmp_path, HF_HOME=str(tmp_path / "hf"))
    assert f"train: {count - 1} rows read, {count - 1} kept, 0 dropped\n" in said


@pytest.mark.slow
def test_two_builds_are_equal_to_the_byte_wherever_they_are_made(tmp_path: Path) -> None:
    for place, seed in (("here", "1"), ("elsewhere/deep", "2")):
        (tmp_path / place).mkdir(parents=True)
        write_rows(tmp_path / place / "rows.jsonl", [published(number) for number in range(30)] + ["{"])
        options = ["--published", "rows.jsonl", "--license", "mit", "--output", "built"]
        run("build_multiverse_1k.py", *options, cwd=tmp_path / place, PYTHONHASHSEED=seed)
    one, other = contents(tmp_path / "here/built"), contents(tmp_path / "elsewhere/deep/built")
    assert one == other
    assert len(one) == 10
    for name, content in one.items():
        assert str(tmp_path).encode() not in content, name


def test_a_dataset_of_chains_needs_no_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "chains"
    assert build(monkeypatch, "build_chains.py", "--num-rows", "60", "--test-share", "0.2", "--output", out) == 0
    train, test = load(out, "multiverse"), load(out, "multiverse", "test")
    assert len(train) + len(test) + len((out / "dropped_rows.jsonl").read_text().splitlines()) == 60
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    kinds = Counter(json.loads(row["provenance"])["kind"] for row in train + test)
    assert set(kinds) == {"single", "flat", "nested"}
    for row in train + test:
        assert row["document"].endswith(f"Answer: {row['answer']}")
        assert row["depth"] == ["single", "flat", "nested"].index(json.loads(row["provenance"])["kind"])
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "size_categories:\n- n<1K" in card
    for column in (column for columns in CONFIGS.values() for column in columns):
        assert f"| `{column}` |" in card
    assert "Tokens are those of `multiverse-tiny`" in card
    assert (out / "statistics.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "statistics.json").read_text())["splits"]["train"]["rows"] == len(train)


@pytest.mark.slow
def test_killing_a_build_leaves_no_half_folder_and_the_next_one_clears_up(tmp_path: Path) -> None:
    options = [sys.executable, str(SCRIPTS / "build_chains.py"), "--num-rows", "600", "--output", "chains"]
    process = subprocess.Popen(options, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 1800
    while not any(tmp_path.glob(".chains.writing-*/files/chains/*/*.parquet")):
        assert process.poll() is None, "it has finished too soon to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "chains").exists()
    assert len(list(tmp_path.iterdir())) == 1
    said = run("build_chains.py", "--num-rows", "20", "--output", "chains", cwd=tmp_path)
    assert "chains: 19 train, 1 test rows" in said
    assert [path.name for path in tmp_path.iterdir()] == ["chains"]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("build_multiverse_1k.py", ["--license", "mit", "--output", "new"], "name rows with --curated or --published"),
        ("build_multiverse_1k.py", ["--output", "new"], "--license"),
        (
            "build_multiverse_1k.py",
            ["--curated", "no.jsonl", "--license", "mit", "--output", "new"],
            "no file no.jsonl",
        ),
        ("build_multiverse_1k.py", ["--curated", "bad.jsonl", "--license", "x", "--output", "new"], "none of 1 rows"),
        ("build_multiverse_1k.py", ["--curated", *["bad.jsonl"] * 2, "--license", "x", "--output", "new"], "rename"),
        ("build_chains.py", ["--num-rows", "0", "--output", "new"], "num_rows must be at least 1, got 0"),
        ("build_chains.py", ["--test-share", "1", "--output", "new"], "from 0 to below 1, got 1.0"),
        ("build_chains.py", ["--output", "full"], "full is not empty; name a new folder"),
        ("build_chains.py", ["--output", "bad.jsonl"], "bad.jsonl is a file"),
        ("build_chains.py", ["--tokenizer", "./none", "--output", "new"], "cannot load the tokenizer ./none"),
        ("publish.py", ["none", "me/none"], "no folder none; build one first"),
        ("publish.py", ["full", "me/none"], "full holds no README.md"),
        ("publish.py", ["full", "none"], "a repository is OWNER/NAME, got 'none'"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    script: str,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("mine")
    write_rows(tmp_path / "bad.jsonl", ["{"])
    assert build(monkeypatch, script, *options) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1]
    assert "Traceback" not in "".join(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept"]


@pytest.mark.parametrize("script", ["build_multiverse_1k.py", "build_chains.py", "publish.py"])
def test_help_shows_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, script: str) -> None:
    assert build(monkeypatch, script, "--help") == 0
    assert f"python datasets_scripts/{script} " in capsys.readouterr().out


def test_a_tokenizer_of_ones_own_counts_and_gets_the_tags_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "recipes/tiny-random/make_base.py", "--output", "bytes") == 0
    assert build(monkeypatch, "build_chains.py", "--num-rows", "9", "--tokenizer", "bytes", "--output", "new") == 0
    assert "Tokens are those of `bytes`" in (tmp_path / "new/README.md").read_text()
    for row in load(tmp_path / "new"):  # a token for each byte, one for each tag
        assert row["num_tokens"] == len(re.sub(r"</?[A-Z]\w+>", "x", row["document"]))


# Their parts


def test_prompts_are_held_out_whole_and_whatever_the_order() -> None:
    def example(number: int, prompt: str) -> Example:
        return Example(str(number), prompt, parse_document("x"), "x", None, "s", "document", "null")

    examples = [example(number, f"question  {number % 10}") for number in range(30)]
    split = split_examples(examples, 0.3, seed=0)
    assert [len(part) for part in split.values()] == [21, 9]
    held_out = {each.prompt for each in split["test"]}
    assert not held_out & {each.prompt for each in split["train"]}
    assert [int(each.id) for each in split["train"]] == sorted(int(each.id) for each in split["train"])
    assert {each.prompt for each in split_examples(examples[::-1], 0.3, seed=0)["test"]} == held_out
    assert {each.prompt for each in split_examples(examples, 0.3, seed=1)["test"]} != held_out
    assert [len(part) for part in split_examples(examples[:1], 0.3, seed=0).values()] == [1, 0]


def test_passes_are_those_of_the_recipes_sampler() -> None:
    from multiverse_hf.data.curriculum import Choice, CurriculumSampler

    sampler = CurriculumSampler([Choice(2 * n, 2 * n + 1, 9, 9) for n in range(10)], PAPER_SHARES, seed=3)
    for epoch, rows in enumerate(plan_passes(10, 3)):
        sampler.set_epoch(epoch)
        assert [2 * index + (form is Form.SEQUENTIAL) for index, form in rows] == [row for (row,) in sampler]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), new_folder(tmp_path / "a/b") as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert list((tmp_path / "a").iterdir()) == []
    with new_folder(tmp_path / "a/b") as folder:
        (folder / "one").write_text("x")
        assert not (tmp_path / "a/b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    with pytest.raises(CommandError, match="not empty"), new_folder(tmp_path / "a/b"):
        pass
    taken = new_folder(tmp_path / "c")
    taken.__enter__()
    (tmp_path / "c").mkdir()
    (tmp_path / "c/meanwhile").write_text("x")
    with pytest.raises(CommandError, match="name a new folder"):
        taken.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["meanwhile"]


# Publishing


COMPARE = """
import sys
from datasets import get_dataset_default_config_name, load_dataset
from huggingface_hub import hf_hub_download
folder, repo = sys.argv[1:]
for config in ("multiverse", "autoregressive", "mixed"):
    for split in ("train", "test"):
        here, there = (list(load_dataset(name, config, split=split, streaming=True)) for name in (folder, repo))
        assert here == there and here, (config, split)
assert list(load_dataset(repo, split="train")) == list(load_dataset(folder, "multiverse", split="train"))
assert get_dataset_default_config_name(repo) == "multiverse"
card = hf_hub_download(repo, "README.md", repo_type="dataset")
assert open(card, "rb").read() == open(f"{folder}/README.md", "rb").read()
print("equal")
"""


@pytest.mark.slow
def test_a_published_folder_is_one_commit_and_loads_from_the_hub_as_it_does_from_the_disk(
    monkeypatch: pytest.MonkeyPatch, hub: dict[str, str], tmp_path: Path
) -> None:
    rows = [published(number) for number in range(12)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    options = ["--published", source, "--license", "mit", "--output"]
    assert build(monkeypatch, "build_multiverse_1k.py", *options, tmp_path / "built") == 0
    assert build(monkeypatch, "build_multiverse_1k.py", *options, tmp_path / "again", "--test-share", "0") == 0
    (tmp_path / "built/notes.txt").write_text("not of a build")

    said = run("publish.py", "built", "me/mine", "--dry-run", cwd=tmp_path, **hub)
    assert re.search(r"10 files, [\d,]+ bytes would go to me/mine in one commit", said)
    assert "left out, as no build writes it: notes.txt" in said
    assert read_log(hub) == {"commits": [], "refused": 0, "large": 0}

    said += run("publish.py", "built", "me/mine", "--message", "First", cwd=tmp_path, **hub)
    assert f"{hub['HF_ENDPOINT']}/datasets/me/mine/commit/" in said
    (commit,) = read_log(hub)["commits"]
    assert commit["summary"] == "First"
    assert set(commit["added"]) == set(contents(tmp_path / "built")) - {"notes.txt"}
    compare = [sys.executable, "-c", COMPARE, "built", "me/mine"]
    done = subprocess.run(compare, cwd=tmp_path, env=environment(**hub), capture_output=True, text=True, timeout=1800)
    assert done.stdout == "equal\n", done.stderr[-3000:]

    # a later build, without a test split: what it lacks goes in the same commit, and the default stays
    said += run("publish.py", "again", "me/mine", cwd=tmp_path, **hub)
    first, second = read_log(hub)["commits"]
    assert first == commit
    assert second["deleted"] == [f"{config}/test-00000-of-00001.parquet" for config in sorted(CONFIGS)]

    assert TOKEN not in said
    for name, content in contents(tmp_path).items():
        assert TOKEN.encode() not in content, f"the token is in {name}"


@pytest.mark.slow
def test_without_a_token_that_may_write_nothing_is_published_and_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, hub: dict[str, str], tmp_path: Path
) -> None:
    assert build(monkeypatch, "build_chains.py", "--num-rows", "5", "--output", tmp_path / "chains") == 0
    said = run("publish.py", "chains", "me/chains", cwd=tmp_path, code=1, **hub | {"HF_TOKEN": "hf_of-another"})
    assert said.count("\n") == 1
    assert "does not let you write to me/chains (401); set HF_TOKEN to a token that may" in said
    assert "hf_of-another" not in said
    log = read_log(hub)
    assert log["commits"] == []
    assert log["refused"] > 0


def test_a_folder_that_does_not_fit_its_card_is_not_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    out = tmp_path / "chains"
    assert build(monkeypatch, "build_chains.py", "--num-rows", "5", "--output", out) == 0
    (out / "mixed/test-00000-of-00001.parquet").unlink()
    assert build(monkeypatch, "publish.py", out, "me/chains", "--dry-run") == 2
    assert "holds no mixed/test-*.parquet, which its card names" in capsys.readouterr().err
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("  default: true\n", ""))
    assert build(monkeypatch, "publish.py", out, "me/chains", "--dry-run") == 2
    assert "has 0 default configs, not one" in capsys.readouterr().err
    (out / "README.md").write_text("no card")
    assert build(monkeypatch, "publish.py", out, "me/chains", "--dry-run") == 2
    assert "cannot read the configs" in capsys.readouterr().err


def test_a_damaged_file_or_one_too_many_is_not_published(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    out = tmp_path / "chains"
    assert build(monkeypatch, "build_chains.py", "--num-rows", "5", "--output", out) == 0
    file, other = out / "mixed/train-00000-of-00001.parquet", out / "mixed/notes.parquet"
    shutil.copyfile(file, other)
    assert build(monkeypatch, "publish.py", out, "me/chains", "--dry-run") == 0
    assert "left out, as no build writes it: mixed/notes.parquet" in capsys.readouterr().out
    more = out / "mixed/train-00001-of-00002.parquet"
    shutil.copyfile(file, more)
    assert build(monkeypatch, "publish.py", out, "me/chains", "--dry-run") == 2
    assert re.search(r"holds \d+ rows of mixed, train, and its card says \d+", capsys.readouterr().err)
    more.unlink()
    os.truncate(file, file.stat().st_size // 2)
    assert build(monkeypatch, "publish.py", out, "me/chains", "--dry-run") == 2
    assert "mixed/train-00000-of-00001.parquet is damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_an_empty_folder_will_do_and_the_one_one_is_in_will_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [published(number) for number in range(3)])
    options = ["--published", rows, "--license", "mit", "--output"]
    for name in ("empty", "k[c] \u00fc", "n" * 245):
        left = tmp_path / f".{name[:100]}.writing-x"  # as a killed build leaves it
        left.mkdir()
        (left / "lock").touch()
        (tmp_path / name).mkdir()
        assert build(monkeypatch, "build_multiverse_1k.py", *options, tmp_path / name) == 0, capsys.readouterr().err
        assert (tmp_path / name / "README.md").is_file()
        assert not left.exists()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert build(monkeypatch, "build_multiverse_1k.py", *options, ".") == 2
    assert "cannot be replaced as a whole; name a new folder in it" in capsys.readouterr().err


def test_rows_without_an_id_are_told_apart_and_ids_are_checked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = []
    for part in (1, 2):
        rows = [published(10 * part + number, id=None) for number in range(2)]
        sources.append(write_rows(tmp_path / f"part.{part}.jsonl", rows))
    bad = [published(30, id=[1]), published(31, id="\ud800"), published(32, metadata="\udfff"), published(33, id=" ")]
    sources.append(write_rows(tmp_path / "bad.jsonl", bad))
    out = tmp_path / "built"
    assert (
        build(monkeypatch, "build_multiverse_1k.py", "--published", *sources, "--license", "mit", "--output", out) == 0
    )
    import datasets

    ids = [row["id"] for split in ("train", "test") for row in datasets.load_dataset(str(out), split=split)]
    assert sorted(ids) == ["bad-00004", "part.1-00001", "part.1-00002", "part.2-00001", "part.2-00002"]
    dropped = [json.loads(line) for line in (out / "dropped_rows.jsonl").read_text().splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in dropped] == [
        (1, "wrong columns"), (2, "unreadable"), (3, "unreadable"),
    ]  # fmt: skip
