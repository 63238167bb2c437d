"""Two replicas behind the nginx of docs/examples: streams, a replica that is killed, and none that is left."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

import httpx2  # noqa: E402 - comes with openai
from endpoint import served_process, serving  # noqa: E402
from replicas import NAME, kill_one_under_load, read_metric  # noqa: E402

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="needs nginx; `make system` installs it"),
]
CONFIG = Path(__file__).parents[1] / "docs/examples/nginx.conf"


@contextlib.contextmanager
def nginx_before(folder: Path, *replicas: str) -> Iterator[str]:
    """Run nginx with the file of the docs, its addresses replaced, before replicas. Yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    text = CONFIG.read_text()
    for old, new in zip(("127.0.0.1:8000", "127.0.0.1:9001", "127.0.0.1:9002"), (address, *replicas), strict=True):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "multiverse.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "nginx.conf").write_text(
        f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{folders}include {folder}/multiverse.conf;\n}}\n"
    )
    log = folder / "error.log"
    process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.PIPE)
    try:
        while True:
            with contextlib.suppress(OSError), socket.create_connection(address.split(":")):
                break
            assert process.poll() is None, process.stderr.read() + log.read_bytes()
            time.sleep(0.02)
        yield f"http://{address}"
    finally:
        process.send_signal(signal.SIGQUIT)
        process.kill() if process.poll() is None else None
        process.wait(20)
        process.stderr.close()


def test_a_killed_replica_loses_no_request_that_had_not_begun_to_answer(tmp_path: Path) -> None:
    options = ("--dtype", "float32", "--threads", "1", "--max-num-seqs", "2")
    with (
        served_process(*options) as (victim, one),
        served_process(*options) as (_, two),
        nginx_before(tmp_path, one.removeprefix("http://"), two.removeprefix("http://")) as url,
    ):
        kill_one_under_load(url, victim.pid, lambda: read_metric(one, "num_requests_waiting") > 0)
        assert httpx2.get(f"{url}/ready", timeout=60).json() == {"status": "ready", "model": NAME}


def test_what_no_replica_takes_is_a_clear_error(tmp_path: Path) -> None:
    with serving() as one, serving() as two:
        addresses = (each.url.removeprefix("http://") for each in (one, two))
        with nginx_before(tmp_path, *addresses) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

            def ask(text: str = "A=5+6; total?", **options: Any) -> Any:
                messages = [{"role": "user", "content": text}]
                return client.chat.completions.create(model=NAME, messages=messages, max_tokens=4, **options)

            with pytest.raises(openai.BadRequestError, match="temperature"):  # a replica's own error, as it is
                ask(temperature=9)
            with pytest.raises(openai.APIStatusError, match="larger than 4 MiB") as large:
                ask("x" * (5 << 20))
            assert large.value.status_code == 413
            assert httpx2.get(f"{url}/metrics").status_code == 404
            one.worker.is_draining = True
            for _ in range(4):
                ask()
                assert httpx2.get(f"{url}/ready").status_code == 200
            two.worker.is_draining = True
            with pytest.raises(openai.InternalServerError, match=r"being stopped|no replica answered") as none:
                ask()
            assert none.value.status_code == 503
            assert none.value.response.headers["retry-after"]
            assert httpx2.get(f"{url}/ready").status_code == 503


def test_the_page_shows_the_file_that_is_tested() -> None:
    page = (Path(__file__).parents[1] / "docs/replicas.md").read_text()
    assert f"```nginx\n{CONFIG.read_text()}```" in page
