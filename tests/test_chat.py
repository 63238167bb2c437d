"""``multiverse chat``: a conversation in a real terminal, and one with a real server."""

import contextlib
import fcntl
import http.server
import io
import json
import os
import pty
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

from endpoint import Served, serving

from multiverse_hf.checkpoints import EMBEDDED, Attention, Dtype, answer_prompt, load_model, open_checkpoint, quiet
from multiverse_hf.cli import run
from multiverse_hf.cli.chat import content_of
from multiverse_hf.cli.display import Painter, TextStream
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.serving.client import BranchClient, TextPiece
from multiverse_hf.viewing.branches import TEXT_ROLES, BranchTree

SUM, SHORT = "A=19-7+12; B=8+15-3; total?", "A=5+6; B=7+8; total?"
# A program whose controlling terminal is the one that its first argument names.
IN_TERMINAL = (
    "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); [os.dup2(fd, each) for each in range(3)]; "
    "os.execv(sys.executable, [sys.executable, '-m', 'multiverse_hf.cli', *sys.argv[2:]])"
)
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

pytestmark = pytest.mark.usefixtures("unquiet")


class Terminal:
    """A program in a pseudo-terminal of 80 columns."""

    def __init__(self, *arguments: str) -> None:
        self.main, self.second = pty.openpty()
        fcntl.ioctl(self.second, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
        environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, os.ttyname(self.second), *arguments],
            env=environment | {"TERM": "xterm"},
            start_new_session=True,
        )
        self.text = ""

    def send(self, keys: str) -> None:
        """Type keys. What was printed before is not waited for any more."""
        self.text = ""
        os.write(self.main, keys.encode())

    def wait(self, pattern: str, seconds: float = 300) -> str:
        """Return what is printed until a pattern appears."""
        end = time.monotonic() + seconds
        while not re.search(pattern, CODES.sub("", self.text)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.text!r}"
            assert self.process.poll() is None or select.select([self.main], [], [], 0)[0], self.text
            if select.select([self.main], [], [], 1)[0]:
                self.text += os.read(self.main, 65536).decode(errors="replace")
        return CODES.sub("", self.text)

    def end(self) -> int:
        """Return the exit code. Little is printed at the end, so the terminal has room for it."""
        return self.process.wait(60)


@contextlib.contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    it = Terminal("chat", *arguments)
    try:
        yield it
    finally:
        if it.process.poll() is None:
            it.process.kill()
        it.process.wait(20)
        os.close(it.main)
        os.close(it.second)


def converse(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str
) -> tuple[int, str, str]:
    """Pipe lines into a chat. Return its exit code, output and errors."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    monkeypatch.setenv("COLUMNS", "80")
    code = run(["chat", *arguments])
    found = capfd.readouterr()
    return code, found.out, found.err


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(keys=("right",)) as it:
        yield it


def answers_to(*lines: str) -> list[str]:
    """The documents of a conversation, each answer without its reasoning in the next prompt."""
    quiet()  # no bar among what a chat writes to standard error
    checkpoint = open_checkpoint(None)
    model = load_model(checkpoint, Dtype.FLOAT32, Attention.SDPA, "cpu", None)
    messages, documents = [], []
    for line in lines:
        ids = checkpoint.encode([*messages, {"role": "user", "content": Suffix.PARALLEL.end(line)}])
        documents.append(answer_prompt(model, checkpoint, ids, max_new_tokens=2048).document)
        content = documents[-1].rpartition("</Think>")[2].strip()
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": content}]
    return documents


@pytest.mark.slow
def test_a_conversation_in_a_terminal() -> None:
    with terminal() as it:
        it.wait(r"\n> $")
        it.send(f"{SUM}\r")
        shown = it.wait(r"finished by stop\s+> $")
        assert re.search(r"─ 1 A .*│ ─ 2 B ", shown)
        assert "Answer: 44" in shown
        it.send("/new\r")
        it.wait(r"forgotten\s+> $")
        it.send(f"{SHORT}!\x1b[D\x05\x7f\r")  # left, to the end, and the last character is deleted
        assert "Answer: 26" in it.wait(r"finished by stop\s+> $")
        it.send("/hepl\r")
        assert "no command /hepl; /help lists them" in it.wait(r"\n> $")
        it.send("\x04")
        assert it.end() == 0


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_and_at_the_prompt_the_chat(tmp_path: Path) -> None:
    endless = Path(shutil.copytree(EMBEDDED, tmp_path / "endless"))  # a model without an end token
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (endless / "generation_config.json").write_text("{}")
    with terminal(str(endless), "--max-new-tokens", "4000") as it:
        it.wait(r"\n> $")
        it.send(f"{SUM}\r")
        it.wait("─ 1 A")
        it.send("\x03")
        assert "the answer was ended" in it.wait(r"\n> $")
        for _ in range(10):  # a signal just before Python's readline waits for a key is seen with the next one
            it.send("\x03")
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert it.process.wait(6) == 130
                break
        assert it.process.poll() == 130


@pytest.mark.slow
def test_earlier_answers_go_back_without_their_reasoning(capfd, monkeypatch) -> None:
    code, out, err = converse(capfd, monkeypatch, f"{SUM}\n\n{SHORT}\n")
    assert (code, out) == (0, "".join(f"{document}\n" for document in answers_to(SUM, SHORT)))
    assert "trained on single problems; /new" in err


@pytest.mark.slow
def test_new_forgets_the_conversation(capfd, monkeypatch) -> None:
    _, out, err = converse(capfd, monkeypatch, f"{SUM}\n/new\n{SHORT}\n/quit\n{SUM}\n")
    assert [line for line in out.splitlines() if line.startswith("Answer")] == ["Answer: 44", "Answer: 26"]
    assert "single problems" not in err


def test_an_answer_without_its_reasoning() -> None:
    checkpoint = open_checkpoint(None)
    assert content_of("<Think>\na\n</Think>\n\nAnswer: 1\n", checkpoint) == "Answer: 1"
    assert content_of("<Think>\ncut off", checkpoint) == ""
    assert content_of("no reasoning", checkpoint) == "no reasoning"


@pytest.mark.slow
def test_a_message_beyond_the_context_does_not_end_the_conversation(capfd, monkeypatch) -> None:
    code, out, err = converse(capfd, monkeypatch, f"{SHORT}\n{'1+' * 5000}\n/new\n{SHORT}\n")
    assert code == 0
    assert out.count("Answer: 26") == 2
    assert re.search(r"^error: the prompt has \d+ tokens, the model's context 4096; .*/new forgets", err, re.MULTILINE)


@pytest.mark.slow
def test_an_endpoint_is_shown_as_a_model_here_is(served: Served) -> None:
    checkpoint = open_checkpoint(None)
    model = load_model(checkpoint, Dtype.FLOAT32, Attention.SDPA, "cpu", None)
    here, there = BranchTree(checkpoint.decode, checkpoint.tags.roles), BranchTree("".join, TEXT_ROLES)
    prompt = Suffix.PARALLEL.end(SUM)
    answer_prompt(
        model, checkpoint, checkpoint.encode(prompt), SimpleNamespace(on_event=here.feed), max_new_tokens=2048
    )
    for event in BranchClient(f"{served.url}/v1", "right").stream(prompt):
        if not isinstance(event, TextPiece):
            there.feed(event)
    painter = Painter(Console(width=100))
    drawn = [[line.plain for line in painter.flow(tree.root, 100)] for tree in (here, there)]
    assert drawn[1] == drawn[0]
    assert re.match("─ 1 A ✓ .*│ ─ 2 B ✓ ", drawn[0][0])
    assert drawn[0][-1] == "Answer: 44"


@pytest.mark.slow
def test_a_conversation_with_an_endpoint(served: Served, capfd, monkeypatch) -> None:
    monkeypatch.setenv("MULTIVERSE_API_KEY", "right")
    lines, (first, second) = f"{SUM}\n{SHORT}\n", answers_to(SUM, SHORT)
    code, out, err = converse(capfd, monkeypatch, lines, "--live", "--url", served.url)
    assert (code, err) == (0, "")
    ends = [document.rpartition("</Think>")[2].strip() for document in (first, second)]
    assert re.findall(r"(Answer: \S+)\s+\d+ tokens, finished by stop", CODES.sub("", out)) == ends
    plain = converse(capfd, monkeypatch, lines, "--url", f"{served.url}/v1", "--model-name", "multiverse-tiny")
    expected = [document.removeprefix("<Think>\n").replace("\n</Think>", "") for document in (first, second)]
    assert plain == (0, "".join(f"{each}\n" for each in expected), "")


@pytest.mark.slow
def test_errors_of_an_endpoint_are_a_line_each(served: Served, capfd, monkeypatch) -> None:
    monkeypatch.delenv("MULTIVERSE_API_KEY", raising=False)
    code, out, err = converse(capfd, monkeypatch, f"{SHORT}\n{SHORT}\n", "--url", served.url, "--api-key", "wrong")
    assert (code, out.strip(), err.count("\n")) == (0, "", 2)
    assert err.count("refuses the key; give its key with --api-key or MULTIVERSE_API_KEY") == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        code, _, err = converse(capfd, monkeypatch, "x\n", "--url", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert (code, err.count("\n")) == (0, 1)
    assert "cannot reach http://127.0.0.1:" in err
    right = ("--url", served.url, "--api-key", "right")
    _, _, err = converse(capfd, monkeypatch, "x\n", *right, "--model-name", "other")
    assert "refuses the request (404): there is no model 'other' here" in err
    _, out, err = converse(capfd, monkeypatch, f"{SHORT}\n{'1+' * 5000}\n/new\n{SHORT}\n", *right)
    assert out.count("Answer: 26") == 2
    assert "context 4096" in err
    assert "; /new forgets the earlier messages" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--url", "somewhere"), "'somewhere' is no address; give one such as http://127.0.0.1:8000"),
        (("--url", "http://host:x"), "is no address"),
        (("multiverse-tiny", "--url", "http://host"), "MODEL and --url exclude each other"),
        (("--threads", "1", "--url", "http://host"), "--threads and --url exclude each other"),
        (("--api-key", "x"), "--api-key is for an endpoint; name it with --url"),
        (("--temperature", "0"), "--temperature must be at least"),
    ],
)
def test_options_that_do_not_fit(arguments: tuple[str, ...], words: str, capfd, monkeypatch) -> None:
    code, _, err = converse(capfd, monkeypatch, "", *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("is_terminal", "text"), [(True, "a[2Jb\n"), (False, "a\x1b[2Jb\n")])
def test_plain_text_has_no_control_codes_in_a_terminal(is_terminal: bool, text: str) -> None:
    file = io.StringIO()
    file.isatty = lambda: is_terminal
    stream = TextStream(file, "".join)
    stream.text.add("a\x1b[2Jb")
    stream.end()
    assert file.getvalue() == text


class OtherServer(http.server.BaseHTTPRequestHandler):
    """An endpoint of another kind: it sends no events, and its text holds an escape code."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
        for text in ("one \x1b[2Jpiece, ", "another\x1b]0;title\x07"):
            chunk = head | {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("form", ["--live", pytest.param("--plain", marks=pytest.mark.slow)])
def test_a_terminal_gets_no_control_codes_of_an_endpoint(form: str) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OtherServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with server, terminal(form, "--url", f"http://127.0.0.1:{server.server_port}", "--model-name", "m") as it:
        it.wait(r"\n> $")
        it.send("hello\r")
        it.wait(r"another\S*\s+> $")
        assert "one [2Jpiece, another]0;title" in it.text
        it.send("/quit\r")
        assert it.end() == 0
        server.shutdown()
