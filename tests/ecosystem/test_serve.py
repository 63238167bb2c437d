"""``transformers serve`` as its users start it, asked by OpenAI's client."""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import pytest

from multiverse_hf import encode_prompt

pytest.importorskip("openai")
pytestmark = pytest.mark.slow
ASKED = "A=19-7+12; B=8+15-3; C=5+6; total? Think step by step and in parallel before answering."
ORDINARY = "A=5+6; B=7+8; total? Think step by step before answering."


@pytest.fixture(scope="module", params=["", "--continuous-batching", "--compile"])
def served(request: pytest.FixtureRequest, folder) -> Iterator[tuple]:
    """A client of a server, and what reads the server's log."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), *request.param.split()]
    with tempfile.TemporaryFile() as log:

        def read() -> str:
            log.seek(0)
            return log.read().decode(errors="replace")

        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(600):
                assert server.poll() is None, f"transformers serve ended: {read()[-3000:]}"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), read
        finally:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def expected(folder, tokenizer):
    """The answer and its cost."""
    from multiverse_hf import MultiverseForCausalLM

    ids = encode_prompt(tokenizer, ASKED, return_tensors="pt")
    output = MultiverseForCausalLM.from_pretrained(folder).generate(
        ids, max_new_tokens=600, do_sample=False, return_dict_in_generate=True
    )
    text = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    return text, output.stats[0]


def ask(client, folder, max_tokens: int, **kwargs) -> tuple[str, str, int]:
    """Ask whole and streamed, which must agree; return the text, why it ended, and the number of tokens."""
    asked = {"model": str(folder), "messages": [{"role": "user", "content": ASKED}], "temperature": 0} | kwargs
    whole = client.chat.completions.create(**asked, max_tokens=max_tokens)
    chunks = list(client.chat.completions.create(**asked, max_tokens=max_tokens, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    text, reason, count = (
        whole.choices[0].message.content,
        whole.choices[0].finish_reason,
        whole.usage.completion_tokens,
    )
    if reason == "stop":
        assert len([piece for piece in pieces if piece]) > 20, "streamed as it is written"
        assert "".join(pieces) == text
    assert chunks[-1].choices[0].finish_reason == reason
    assert chunks[-1].usage.completion_tokens == count
    return text, reason, count


def test_an_answer_branches_and_is_called_cut_off_only_where_it_was(served, folder, expected):
    client, log = served
    text, stats = expected
    assert stats.num_forks > 0
    assert stats.length + 20 < stats.num_tokens
    for max_tokens in (600, stats.length + 10):  # the second is less than the tokens of all its paths
        found, reason, count = ask(client, folder, max_tokens)
        assert (found, reason) == (text, "stop")
        assert abs(count - stats.num_tokens) <= 1  # with its end token, or without
    found, reason, count = ask(client, folder, 30)
    assert reason == "length"
    assert count < stats.num_tokens
    assert "Traceback" not in log()


def test_a_stop_string_inside_a_path_ends_the_answer(served, folder, expected):
    client, _ = served
    found, reason, count = ask(client, folder, 600, stop=["ends at 24"])
    assert reason == "stop"
    assert found.partition("ends at 24")[0] == expected[0].partition("ends at 24")[0]
    assert "Answer:" not in found
    assert count < expected[1].num_tokens


def test_a_message_that_opens_blocks_is_answered(served, folder):
    client, log = served
    asked = [{"role": "user", "content": "<Parallel><Goal><Outline>1:<Parallel><Goal>"}]
    for max_tokens in (5, 60):
        whole = client.chat.completions.create(model=str(folder), messages=asked, max_tokens=max_tokens)
        assert whole.choices[0].finish_reason in ("stop", "length")
    assert "Traceback" not in log()


def test_flags_that_do_not_apply_are_named_in_the_log(served, folder, request):
    client, log = served
    ask(client, folder, 20)
    flag = request.node.callspec.params["served"]
    assert ("does not support continuous batching" in log()) == (flag == "--continuous-batching")
    assert log().count("--compile does not apply") == (flag == "--compile")


def test_an_answer_that_does_not_fork_is_served_as_before(served, folder):
    client, _ = served
    asked = [{"role": "user", "content": ORDINARY}]
    found, reason, count = ask(client, folder, 600, messages=asked)
    assert reason == "stop"
    assert "<Path>" not in found
    cut, reason, shorter = ask(client, folder, count - 10, messages=asked)
    assert (reason, shorter) == ("length", count - 10)
    assert found.startswith(cut[:20])
