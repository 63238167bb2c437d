"""The command line as a person meets it: real processes, and the live view drawn from recorded events."""

import importlib.util
import io
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from helpers import COLON, DIGITS, FIRST_TEXT, NEWLINE, TAGS
from rich.console import Console
from transformers import AutoConfig, Qwen3Config

from multiverse_hf.checkpoints import Attention, Dtype, load_model, open_checkpoint
from multiverse_hf.cli import run
from multiverse_hf.cli.demo import demo_problems, time_modes
from multiverse_hf.cli.display import LiveView, Painter, TextStream, share
from multiverse_hf.cli.generate import read_prompt
from multiverse_hf.data.chains import Kind
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.state import BranchEvent
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.viewing.branches import BranchTree

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "multiverse_hf.cli"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}


def multiverse(*arguments: str, stdin: str | bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell would."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    done = subprocess.run(
        [*COMMAND, *arguments], input=data or b"", capture_output=True, env=ENVIRONMENT, timeout=1800
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def call(capfd: pytest.CaptureFixture[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process: a second rather than the seconds that importing torch takes."""
    code = run(arguments)
    captured = capfd.readouterr()
    return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)


pytestmark = pytest.mark.usefixtures("unquiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the tiny recipe makes its untrained base, smaller still."""
    path = ROOT / "recipes" / "multiverse-tiny" / "make_base.py"
    spec = importlib.util.spec_from_file_location("make_base", path)
    make_base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_base)
    tokenizer = make_base.build_tokenizer(512)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes, **heads, **ends)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    MultiverseForCausalLM.from_config(config, TagSet.from_tokenizer(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endless(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint without an end token: an untrained model seldom chooses it, this one never ends by itself."""
    path = Path(shutil.copytree(folder, tmp_path_factory.mktemp("endless") / "model"))
    edit_config(path, eos_token_id=None, max_position_embeddings=100_000)
    (path / "generation_config.json").write_text("{}", encoding="utf-8")
    return path


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be spoilt."""
    return Path(shutil.copytree(folder, tmp_path / "damaged"))


# What it prints


def test_the_built_in_model_says_that_it_only_adds_chains(capfd):
    done = call(capfd, "generate", "--plain", "--max-new-tokens", "8", "What is the capital of France?")
    assert "only adds chains" in done.stderr
    assert "--model" in done.stderr
    assert (
        "only adds" not in call(capfd, "generate", "--plain", "--max-new-tokens", "8", "A=5+6; B=7+8; total?").stderr
    )


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, "pip install 'multiverse_hf[eval]'"),
        ({"url": "https://host/x.whl", "archive_info": {}}, "pip install 'multiverse_hf[eval]'"),
        (
            {"url": "https://host/repo", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "pip install 'multiverse_hf[eval] @ git+https://host/repo'",
        ),
        ({"dir_info": {"editable": True}}, "pip install -c '{0}/constraints.txt' -e '{0}[eval]'"),
        ({"dir_info": {}}, "pip install -c '{0}/constraints.txt' '{0}[eval]'"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came(origin, line, tmp_path):
    """In a process of its own, beside another distribution of this name."""
    checkout, installed = tmp_path / "a checkout", tmp_path / "installed/multiverse_hf-9.dist-info"
    checkout.mkdir()
    installed.mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt"):
        (checkout / name).write_text("")
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: multiverse_hf\nVersion: 9\n")
    if origin is not None:
        (installed / "direct_url.json").write_text(json.dumps({"url": checkout.as_uri()} | origin))
    paths = os.pathsep.join([str(installed.parent), str(ROOT / "src")])
    code = "from multiverse_hf.errors import install_line; print(install_line('eval'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shlex.split(done.stdout) == shlex.split(line.format(checkout))


def test_help_fills_the_lines_of_a_narrow_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = call(capfd, "generate", "--help").stdout.splitlines()
    begin = next(number for number, line in enumerate(said) if "In a terminal the branches" in line)
    paragraph = said[begin : next(number for number in range(begin, len(said)) if not said[number].strip())]
    words = [line.split() for line in paragraph]
    for line, following in itertools.pairwise(words):  # the next word would not have found room
        assert len(" ".join([*line, following[0]])) > 80 - 3


def test_help_names_the_commands_and_shows_examples_without_importing_torch():
    check = "import sys; from multiverse_hf.cli import run; sys.exit(run(['--help']) or 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, env=ENVIRONMENT, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("generate", "demo", "--version", "Examples"))


def test_json_is_one_object_and_plain_prints_its_document(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    options = ("--model", str(folder), "--max-new-tokens", "40", "--threads", "1")
    problem = tmp_path / "problem.txt"
    problem.write_text("A=5+6; B=7+8; total?\n", encoding="utf-8")
    as_json = call(capfd, "generate", "--file", str(problem), "--json", *options)
    assert (as_json.returncode, as_json.stderr) == (0, "")
    answer = json.loads(as_json.stdout)
    assert as_json.stdout.count("\n") == 1
    assert list(answer) == [
        *("prompt", "document", "text", "answer", "stats", "seconds", "model", "family", "of_record")
    ]
    assert answer["prompt"] == f"A=5+6; B=7+8; total? {PARALLEL_SUFFIX}"
    assert answer["stats"]["length"] <= 40
    assert answer["stats"]["finish_reason"] in ("stop", "length")
    plain = call(capfd, "generate", "--file", str(problem), *options)
    assert (plain.returncode, plain.stderr == "") == (0, answer["stats"]["finish_reason"] == "stop")
    assert plain.stdout == answer["document"] + "\n"


@pytest.mark.slow
def test_a_process_prints_what_a_call_prints(folder: Path, capfd: pytest.CaptureFixture[str]):
    options = ("--model", str(folder), "--max-new-tokens", "40", "--threads", "1")
    done = multiverse("generate", *options, stdin="A=5+6; B=7+8; total?\n")
    called = call(capfd, "generate", "A=5+6; B=7+8; total?", *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, called.stdout, called.stderr)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-new-tokens", "5"], ["length 5", "--max-new-tokens", "raise"]),
        (["--max-total-tokens", "5"], ["--max-total-tokens", "raise"]),
        (["--max-time", "0"], ["--max-time", "raise"]),
        (["--max-new-tokens", "40"], ["the model's context ends", "shorten"]),
    ],
)
def test_an_answer_that_was_cut_off_says_so_beside_it(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, endless: Path, options: list[str], words: list[str]
):
    if "context" in words[0]:
        endless = Path(shutil.copytree(endless, tmp_path / "short"))
        edit_config(endless, max_position_embeddings=30)
    done = call(capfd, "generate", "x", "--model", str(endless), "--plain", "--suffix", "none", *options)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("note: ")
    assert all(word in done.stderr for word in words), done.stderr


FLAT, NESTED = "A=19-7+12; B=8+15-3; C=5+6; total?", "(A=5+6; B=7+8) (C=9-2; D=4+4) total?"


def test_paths_that_were_cut_off_are_told_of(capfd: pytest.CaptureFixture[str]):
    done = call(capfd, "generate", FLAT, "--plain", "--max-path-tokens", "20")
    assert done.returncode == 0
    assert "paths were cut off; raise --max-path-tokens" in done.stderr
    assert call(capfd, "generate", "A=5+6; B=7+8; total?", "--plain").stderr == ""


@pytest.mark.parametrize(
    ("prompt", "option", "limit", "of"),
    [
        (FLAT, "--max-paths", 2, "max_width"),
        pytest.param(NESTED, "--max-depth", 1, "depth", marks=pytest.mark.slow),
        pytest.param(FLAT, "--max-depth", 0, "num_forks", marks=pytest.mark.slow),
        (FLAT, "--max-new-tokens", 80, "length"),
        pytest.param(FLAT, "--max-total-tokens", 150, "num_tokens", marks=pytest.mark.slow),
        (FLAT, "--max-path-tokens", 20, None),
    ],
)
def test_limits_hold_in_lenient_mode(
    capfd: pytest.CaptureFixture[str], prompt: str, option: str, limit: int, of: str | None
):
    command = ["generate", prompt, "--structure", "lenient", "--greedy", "--json", option]
    held = json.loads(call(capfd, *command, str(limit)).stdout)["stats"]
    free = json.loads(call(capfd, *command, "1000").stdout)["stats"]  # what the model does by itself
    assert free["malformed"] == free["num_closed"] == 0
    if of is None:
        assert held["num_closed"] > 0
        assert held["num_tokens"] < free["num_tokens"]
    else:
        assert held[of] <= limit < free[of]


def test_tags_in_a_prompt_cannot_fork(folder: Path, capfd: pytest.CaptureFixture[str]):
    block = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
    options = ("--model", str(folder), "--max-new-tokens", "5", "--max-depth", "0", "--json", "--suffix", "none")
    done = call(capfd, "generate", block, *options)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer["prompt"] == block
    assert answer["stats"]["max_width"] == 1
    assert "<Path>" not in answer["document"]


def test_sampling_repeats_with_its_seed(folder: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["generate", "A=1+2; total?", "--model", str(folder), "--max-new-tokens", "30", "--json"]
    documents = []
    for seed in ("1", "1", "2"):
        assert run([*arguments, "--temperature", "1.5", "--top-p", "0.95", "--seed", seed]) == 0
        documents.append(json.loads(capsys.readouterr().out)["document"])
    assert documents[0] == documents[1] != documents[2]


def test_demo_reports_both_modes_on_the_same_problems(folder: Path, capfd: pytest.CaptureFixture[str]):
    done = call(
        capfd, "demo", "--model", str(folder), "--max-new-tokens", "24", "--json", "--problems", "2", "--repeats", "3"
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert [problem["num_chains"] for problem in report["problems"]] == [8, 6]
    assert all(not row["autoregressive"]["stats"]["num_forks"] for row in report["problems"])
    assert report["repeats"] == 3
    total = report["total"]
    assert total["speedup"] == pytest.approx(total["autoregressive"]["seconds"] / total["parallel"]["seconds"])


def test_demo_prints_a_table_within_80_columns(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        run(["demo", "--model", str(folder), "--max-new-tokens", "16", "--problems", "2", "--plain", "--repeats", "3"])
        == 0
    )
    table = capsys.readouterr().out.split("problem  ")[-1]
    assert "6 chains, nested" in table
    assert "autoregressive" in table
    assert "total" in table
    assert "float32, on cpu" in table
    assert "medians of 3 runs each, in turns" in " ".join(table.split())
    assert max(map(len, table.split("\n\n")[0].splitlines())) <= 80


@pytest.mark.parametrize(("repeats", "num_rounds"), [(None, 1), (2, 2)])
def test_the_demo_repeats_no_longer_than_its_time_unless_told_to(
    folder: Path, monkeypatch: pytest.MonkeyPatch, repeats: int | None, num_rounds: int
):
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint, Dtype.AUTO, Attention.SDPA, "cpu", None)
    monkeypatch.setattr("multiverse_hf.cli.demo.MOST_SECONDS", 0)
    runs, *others = time_modes(model, checkpoint, [checkpoint.encode("x")] * 2, 4, repeats)
    assert len(others) == (repeats is not None)  # a problem that time is not left for
    assert {mode: len(answers) for mode, answers in runs.items()} == {
        "parallel": num_rounds,
        "autoregressive": num_rounds,
    }


def test_demo_problems_have_a_nested_one_and_one_of_eight_chains():
    problems = demo_problems(seed=0, num_problems=5)
    assert [problem.kind for problem in problems[:3]] == [Kind.FLAT, Kind.NESTED, Kind.FLAT]
    assert len(problems[0].chains) == 8
    assert problems == demo_problems(seed=0, num_problems=5)
    assert problems != demo_problems(seed=1, num_problems=5)


# Errors: one line that says what to do


def assert_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_an_error_of_the_process_is_one_line_and_its_exit_code():
    assert_error(multiverse("generate", stdin=" \n"), 2, "standard input", "empty")
    assert_error(multiverse("generate", stdin=b"caf\xe9"), 2, "UTF-8")


def test_a_prompt_over_the_context_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]):
    assert_error(call(capfd, "generate", "word " * 400, "--model", str(folder)), 2, "context 256", "shorten")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--sede", "1", "x"], ["--sede. Did you mean --seed?", "multiverse generate --help"]),
        (["generat", "x"], ["generat'", "'generate'", "multiverse --help"]),
        (["generate", " "], ["empty"]),
        (["generate", "x", "--file", "y"], ["both", "one of them"]),
        (["generate", "--file", "no/such/file"], ["no/such/file", "check the path"]),
        (["generate", "x", "--dtype", "float12"], ["float12", "bfloat16"]),
        (["generate", "x", "--attn", "flash"], ["flash", "sdpa"]),
        (["generate", "x", "--max-new-tokens", "0"], ["--max-new-tokens", "1"]),
        (["generate", "x", "--temperature", "0"], ["--temperature", "--greedy"]),
        (["generate", "x", "--temperature", "1e-45"], ["--temperature", "1e-45", "--greedy"]),
        (["generate", "x", "--top-p", "1.5"], ["--top-p"]),
        (["generate", "x", "--speculate", "-3"], ["--speculate", "auto", "-3"]),
        (["generate", "x", "--greedy", "--temperature", "1"], ["--greedy"]),
        (["generate", "x", "--json", "--live"], ["--json", "--live"]),
        (["generate", "x", "--model", "./no-such-model"], ["./no-such-model", "owner/name"]),
        (["generate", "x", "--model", ""], ["name is empty"]),
        (["generate", "x", "--model", "a" * 5000], ["no model folder aaa"]),
        (["generate", "x", "--model", "~nobody-there/x"], ["no model folder ~nobody-there/x"]),
    ],
)
def test_bad_usage_is_answered_in_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], words: list[str]):
    assert_error(call(capfd, *arguments), 2, *words)


def test_closed_streams_are_an_error_of_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # what Python makes of >&-
        code = run(["generate", "x", "--model", str(folder), "--json"])
    captured = capfd.readouterr()
    done = subprocess.CompletedProcess([], code, captured.out, captured.err)
    assert_error(done, 2, "standard output is closed")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        assert_error(call(capfd, "generate", "--model", str(folder)), 2, "no prompt")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert run(["generate", "x", "--model", "./no-such-model"]) == 2
        sys.stderr.close()
    assert capfd.readouterr() == ("", "")


def test_a_repository_that_cannot_be_reached_is_an_error_of_one_line(capfd: pytest.CaptureFixture[str]):
    assert_error(call(capfd, "generate", "x", "--model", "nobody/nothing"), 1, "nobody/nothing", "Hub")


def test_text_that_is_not_utf8_is_refused(capfd: pytest.CaptureFixture[str], tmp_path: Path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    assert_error(call(capfd, "generate", "--file", str(tmp_path / "latin1.txt")), 2, "UTF-8", "convert")


def truncate_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])


def scramble_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 4096)


def edit_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps(config | values), encoding="utf-8")


def add_layer(path: Path) -> None:
    edit_config(path, num_hidden_layers=3, layer_types=["full_attention"] * 3)


def widen(path: Path) -> None:
    edit_config(path, intermediate_size=64)


def make_encoder_decoder(path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(path)


def make_recurrent(path: Path) -> None:
    AutoConfig.for_model("mamba").save_pretrained(path)


def invent_architecture(path: Path) -> None:
    edit_config(path, model_type="qwen99")


def drop_tags(path: Path) -> None:
    edit_config(path, multiverse=None)
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["special"]]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("added_tokens_decoder", None)
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def drop(*names: str) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return spoil


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda path: (path / name).write_text(text, encoding="utf-8")


def swap_tags(path: Path) -> None:
    tags = json.loads((path / "config.json").read_text(encoding="utf-8"))["multiverse"]
    ids = tags["ids"]
    edit_config(path, multiverse=tags | {"ids": ids | {"<Goal>": ids["<Path>"], "<Path>": ids["<Goal>"]}})


def remove_layer(path: Path) -> None:
    edit_config(path, num_hidden_layers=1, layer_types=["full_attention"])


BREAK_CONFIG = write("config.json", '{"model_type": "qwen3",')
GENERATION = "generation_config.json"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncate_weights, ["weights", "again"]),
        (scramble_weights, ["weights", "again"]),
        (drop("model.safetensors"), ["weights"]),
        (BREAK_CONFIG, ["config", "again"]),
        (drop("config.json"), ["config.json"]),
        (write("tokenizer.json", "{}"), ["tokenizer", "again"]),
        (add_layer, ["lacks", "layers.2"]),
        (widen, ["shapes", "mlp"]),
        (make_encoder_decoder, ["encoder-decoder"]),
        (make_recurrent, ["cannot branch", "mamba"]),
        (invent_architecture, ["qwen99", "upgrade"]),
        (drop_tags, ["no token for <Think>"]),
        (swap_tags, ["<Goal>", "config", "tokenizer"]),
        (remove_layer, ["does not have", "layers.1"]),
        (drop("tokenizer.json"), ["no tokenizer.json"]),
        (drop("tokenizer_config.json"), ["no tokenizer_config.json"]),
        (drop("tokenizer.json", "tokenizer_config.json"), ["no tokenizer.json"]),
        (write("config.json", "null"), ["config.json", "null", "again"]),
        (write("tokenizer_config.json", "[]"), ["tokenizer_config.json", "[]", "again"]),
        (write(GENERATION, "{"), [GENERATION, "line 1", "again"]),
        (write(GENERATION, "null"), [GENERATION, "null", "again"]),
        (write(GENERATION, '{"eos_token_id": "x"}'), [GENERATION, "'x'", "eos_token_id"]),
        (write(GENERATION, '{"eos_token_id": [2, 99999]}'), [GENERATION, "99999", "eos_token_id"]),
        (write(GENERATION, '{"num_beams": 4}'), ["cannot answer", "num_beams=4"]),
        (write("chat_template.jinja", "{% for x"), ["chat template", "again"]),
        (write("chat_template.jinja", "{{ raise_exception('no users') }}"), ["chat template", "no users"]),
        (write("chat_template.jinja", "{# nothing #}"), ["no token"]),
    ],
)
def test_a_checkpoint_that_cannot_serve_is_refused_in_one_line(
    capfd: pytest.CaptureFixture[str], damaged: Path, spoil, words: list[str]
):
    spoil(damaged)
    assert_error(call(capfd, "generate", "x", "--model", str(damaged)), 2, *words)


@pytest.mark.parametrize("device", ["gpu7", "meta"])
def test_a_device_that_is_not_there_is_refused(capfd: pytest.CaptureFixture[str], folder: Path, device: str):
    assert_error(call(capfd, "generate", "x", "--model", str(folder), "--device", device), 2, device, "--device cpu")


def test_a_traceback_is_shown_when_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damaged: Path
):
    BREAK_CONFIG(damaged)
    asked = call(capfd, "generate", "x", "--model", str(damaged), "--traceback")
    monkeypatch.setenv("MULTIVERSE_TRACEBACK", "1")
    for done in (asked, call(capfd, "generate", "x", "--model", str(damaged))):
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.fixture
def long_run(endless: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes for long, once its first byte is out."""
    arguments = ["generate", "x", "--model", str(endless), "--max-new-tokens", "90000", "--structure", "off"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    assert process.stdout.read(1)
    yield process
    if process.poll() is None:
        process.kill()
    process.wait()


@pytest.mark.slow
def test_a_closed_pipe_ends_it_without_a_word(long_run: subprocess.Popen[bytes]):
    long_run.stdout.close()
    assert long_run.wait(timeout=1800) != 0
    assert long_run.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_it_with_130_and_without_a_traceback(long_run: subprocess.Popen[bytes]):
    time.sleep(0.1)
    long_run.send_signal(signal.SIGINT)
    assert long_run.wait(timeout=1800) == 130
    assert long_run.stderr.read() == b""


# The live view

LETTERS = {FIRST_TEXT + number: letter for number, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghij =+.\x1b")}
PIECES = LETTERS | {NEWLINE: "\n", COLON: ":"} | {token: digit for digit, token in DIGITS.items()}
TOKENS = {piece: token for token, piece in PIECES.items()}


def decode(ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in ids)


def spoken(branch: str, text: str) -> list[BranchEvent]:
    """Events of a branch that writes a text; a tag is one token."""
    events = []
    while text:
        tag = next((tag for tag in TAGS.names.tokens if text.startswith(tag)), None)
        token, size = (TAGS.ids[tag], len(tag)) if tag else (TOKENS[text[0]], 1)
        events.append(BranchEvent(0, "token", branch, token, True))
        text = text[size:]
    return events


def forked(branch: str, titles: Sequence[str]) -> list[BranchEvent]:
    """Events of a block's goal, up to the forced start of its paths."""
    labels = [f"{branch}.{number}".lstrip(".") for number in range(1, len(titles) + 1)]
    spelled = [label.replace(".", "") for label in labels]  # the made-up vocabulary has no dot for labels
    outlines = "".join(f"<Outline>{s}: {t}</Outline>" for s, t in zip(spelled, titles, strict=True))
    events = spoken(branch, f"<Parallel>\n<Goal>{outlines}</Goal>")
    events.append(BranchEvent(0, "fork", branch, num_paths=len(titles)))
    for label, text in zip(labels, spelled, strict=True):
        events += spoken(label, f"\n<Path>\n{text}:")
    return events


def closed(branch: str) -> list[BranchEvent]:
    return [*spoken(branch, "\n</Path>"), BranchEvent(0, "close", branch)]


def merged(branch: str, text: str) -> list[BranchEvent]:
    conclusion = f"\n<Conclusion>\n{text}\n</Conclusion>\n</Parallel>"
    return [BranchEvent(0, "reduce", branch), *spoken(branch, conclusion)]


def drawn(events: Sequence[BranchEvent], width: int, height: int | None = None, ascii_only: bool = False) -> list[str]:
    tree = BranchTree(decode, TAGS.roles)
    for event in events:
        tree.feed(event)
    console = Console(file=io.StringIO(), width=width)
    return [line.plain for line in Painter(console, ascii_only).flow(tree.root, width, height)]


def test_branches_stand_side_by_side_between_the_text_before_and_after():
    events = [*spoken("", "<Think>\nFIRST\n"), *forked("", ["A", "B"])]
    events += [*spoken("1", " ONE\nMORE"), *spoken("2", " TWO"), *closed("1"), *closed("2")]
    events += [*merged("", "2 BOTH"), *spoken("", "\nSUM\n</Think>\n\nDONE")]
    assert drawn(events, 56, ascii_only=True) == [
        "FIRST",
        # 56 characters: two columns of 26 with a gutter of 3, and one left over
        "- 1 A done --------------- | - 2 B done ---------------",
        "ONE                        | TWO",
        "MORE                       |",
        "=> 2 BOTH",
        "SUM",
        "DONE",
    ]


def test_a_goal_being_written_lists_its_outlines():
    events = spoken("", "<Parallel>\n<Goal><Outline>1: A</Outline><Outline>2: BC")
    assert drawn(events, 40) == ["· 1: A", "· 2: BC"]


def test_nested_branches_stand_inside_the_column_of_their_group():
    events = [*forked("", ["A B", "C"]), *forked("1", ["A", "B"])]
    events += [*spoken("1.1", " ONE"), *spoken("1.2", " TWO"), *spoken("2", " OTHER")]
    # 111 characters: two columns of 54; the first holds two of 25
    assert drawn(events, 111) == [
        "━ 1 A B " + "━" * 46 + " │ ─ 2 C " + "─" * 48,
        "─ 1.1 A ───────────────── │ ─ 1.2 B ─────────────────  │ OTHER",
        "ONE                       │ TWO                        │",
    ]
    # at 80 a group's column is too narrow for two: they stand one below the other
    assert drawn(events, 80)[1:] == [
        "─ 1.1 A ────────────────────────────── │ OTHER",
        "ONE                                    │",
        "─ 1.2 B ────────────────────────────── │",
        "TWO                                    │",
    ]


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("num_paths", range(2, 9))
def test_every_branch_is_seen_within_the_terminal_however_many_there_are(width: int, num_paths: int):
    events = forked("", ["TITLE"] * num_paths)
    for number in range(1, num_paths + 1):
        events += spoken(str(number), "".join(f"\nLINE {line} OF A CHAIN" for line in range(30)) + f"\nEND {number}")
    lines = drawn(events, width, 23)
    assert len(lines) <= 23
    assert max(map(len, lines)) <= width
    for number in range(1, num_paths + 1):
        assert any(f"END {number}" in line for line in lines)  # the newest line of each
        assert any(f"─ {number} TITLE" in line for line in lines)


def test_a_view_too_low_for_all_rows_keeps_its_height():
    events = forked("", ["A"] * 16)
    for height in range(1, 8):
        assert len(drawn(events, 30, height)) <= height


def test_long_words_and_escape_codes_cannot_leave_their_column():
    events = [*forked("", ["A", "B\x1b"]), *spoken("1", " " + "W" * 60), *spoken("2", " X\x1bY")]
    lines = drawn(events, 56)
    assert max(map(len, lines)) <= 56
    assert "XY" in lines[1]
    assert "\x1b" not in "".join(lines)


def test_lines_are_shared_out_evenly_and_never_beyond_need():
    assert share([2, 9, 9], 12) == [2, 5, 5]
    assert share([1, 1], 9) == [1, 1]
    assert share([3, 3, 3], 2) == [1, 1, 0]


def test_the_live_view_leaves_the_whole_answer_and_a_restored_terminal():
    file = io.StringIO()
    console = Console(file=file, width=56, height=10, force_terminal=True, color_system=None)
    events = [*spoken("", "FIRST\n"), *forked("", ["A", "B"])]
    events += spoken("1", "".join(f"\nLINE {line}" for line in range(10, 40)))

    def interrupted() -> None:
        with LiveView(console, decode, TAGS.roles) as view:
            for event in events:
                view.on_event(event)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = file.getvalue()
    settled = text[text.rindex("─ 1 A") :]
    assert "FIRST" in text
    assert all(f"LINE {line}" in settled for line in range(10, 40))
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_white_space_at_the_beginning_of_a_streamed_line_stays():
    """A decoder of sentencepiece's kind drops the space before the first token that it is given."""
    pieces = ["▁def", "▁f", ":", "\n", "▁", "▁", "▁return", "\n", "▁x"]
    file = io.StringIO()
    stream = TextStream(file, lambda ids: "".join(pieces[i] for i in ids).removeprefix("▁").replace("▁", " "))
    stream.put(torch.tensor([[0]]))  # the prompt
    for token in range(len(pieces)):
        stream.put(torch.tensor([token]))
    stream.end()
    assert file.getvalue() == "def f:\n   return\n x\n"


def test_the_text_stream_writes_every_character_once():
    file = io.StringIO()
    # two bytes of one character in two tokens: the first alone decodes to a replacement character
    pieces = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b"\n", 5: b"\xff"}
    stream = TextStream(file, lambda ids: b"".join(pieces[i] for i in ids).decode(errors="replace"))
    stream.put(torch.tensor([[1, 1, 1]]))  # the prompt
    seen = []
    for token in (1, 2, 3, 4, 1, 5):
        stream.put(torch.tensor([token]))
        seen.append(file.getvalue())
    stream.end()
    assert seen == ["a", "a", "aé", "aé\n", "aé\na", "aé\na"]
    assert file.getvalue() == "aé\na\ufffd\n"


def test_a_prompt_that_has_its_suffix_gets_no_second():
    from multiverse_hf.data.suffixes import Suffix

    text = f"A=1+2; total? {PARALLEL_SUFFIX}"
    assert Suffix.PARALLEL.end(read_prompt(text, None)) == text
    assert Suffix.SEQUENTIAL.end(read_prompt(text, None)) == text
    assert Suffix.PARALLEL.end(read_prompt("A=1+2; total?\n", None)) == text
