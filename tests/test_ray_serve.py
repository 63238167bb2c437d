"""The endpoint behind a real Ray Serve of this machine, started as its users do."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray.serve", reason="needs multiverse_hf[ray]")
pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
import httpx2  # comes with openai
import openai
from replicas import NAME, kill_one_under_load, read_metric, wait_for

pytestmark = pytest.mark.long  # with Ray's other tests; not part of CI
KEY = {"Authorization": "Bearer none"}
CONFIG = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - import_path: multiverse_hf.serving.ray_serve:build
    args: {{replicas: 2, cpus: 0.1, dtype: float32, max_num_seqs: 2, api_key_file: {keys}}}
"""


def children(process: int) -> dict[int, str]:
    """Return the processes below one, with their names."""
    found = {}
    for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{child}/cmdline").read_text().strip("\0")
            found |= {int(child): name} | children(int(child))
    return found


@pytest.fixture(scope="module")
def ray_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """Run ``serve run``. Yield its process and the address of the endpoint."""
    folder = tmp_path_factory.mktemp("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "keys.txt").write_text("none\n")
    (folder / "serve.yaml").write_text(CONFIG.format(port=port, keys=folder / "keys.txt"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    with open(folder / "log", "w") as log:
        command = [Path(sys.executable).with_name("serve"), "run", folder / "serve.yaml"]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:

        def is_ready() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            with contextlib.suppress(OSError, httpx2.TransportError):
                return httpx2.get(f"{url}/ready", timeout=60).status_code == 200
            return False

        url = f"http://127.0.0.1:{port}"
        wait_for(is_ready, "Ray Serve is not ready", 600)
        body = {"model": NAME, "prompt": "A", "max_tokens": 4}
        httpx2.post(f"{url}/v1/completions", json=body, headers=KEY, timeout=120).raise_for_status()
        steps: set[float] = set()  # of the replica that has answered, and of the other one

        def are_both_ready() -> bool:
            steps.add(read_metric(url, "num_steps_total"))
            return len(steps) == 2

        wait_for(are_both_ready, "one replica is ready, and not the other", 300)
        yield process.pid, url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_killed_replica_loses_no_request_that_had_not_begun_to_answer(ray_serve: tuple[int, str]) -> None:
    process, url = ray_serve

    def has_waiting() -> bool:
        # Ray asks the replica that has fewer requests, so if three are in that one, one waits in each
        return all(read_metric(url, "num_answers_active") > 2 for _ in range(5))

    replicas = [each for each, name in children(process).items() if name.startswith("ray::ServeReplica:default:Rep")]
    assert len(replicas) == 2
    kill_one_under_load(url, replicas[0], has_waiting)


def test_streams_keys_errors_and_clients_that_leave_are_those_of_the_server(ray_serve: tuple[int, str]) -> None:
    _, url = ray_serve
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    body = {"model": NAME, "messages": [{"role": "user", "content": "A=5+6; total?"}]}
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**body, temperature=9)
    lines = httpx2.post(f"{url}/v1/completions", json={"model": NAME, "prompt": "A", "max_tokens": 4, "stream": True},
                        headers=KEY, timeout=120).text.split("\n\n")  # fmt: skip
    assert lines[-2:] == ["data: [DONE]", ""]
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "text_completion"
    for streams in (True, False):
        endless = {**body, "max_tokens": 2000, "ignore_eos": True, "stream": streams}
        with (
            contextlib.suppress(httpx2.ReadTimeout),
            httpx2.stream("POST", f"{url}/v1/chat/completions", json=endless, timeout=3,
                          headers=KEY) as reply,
        ):  # fmt: skip
            next(reply.iter_lines())
    # whichever replica answers
    wait_for(lambda: sum(read_metric(url, "num_answers_active") for _ in range(6)) == 0, "an answer goes on")
