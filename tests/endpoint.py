"""A server of the embedded model on a free port, in this process or in one of its own."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from multiverse_hf.checkpoints import Attention, Dtype, open_checkpoint
from multiverse_hf.serving.app import create_app
from multiverse_hf.serving.config import ServerConfig
from multiverse_hf.serving.metrics import Metrics
from multiverse_hf.serving.run import listen
from multiverse_hf.serving.worker import ModelWorker


@dataclass
class Served:
    """A server that runs."""

    url: str
    worker: ModelWorker


@contextlib.contextmanager
def serving(model: str | None = None, dtype: Dtype = Dtype.FLOAT32, **options: Any) -> Iterator[Served]:
    """Serve a model from a thread of this process, over a real socket."""
    config = ServerConfig(**{"name": "multiverse-tiny", **options})
    metrics = Metrics()
    worker = ModelWorker(config, metrics)
    worker.open(open_checkpoint(model), dtype, Attention.SDPA, "cpu", None)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(worker, config, metrics), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", worker)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        worker.close()


@contextlib.contextmanager
def served_process(*options: str, wait: bool = True) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run ``multiverse serve`` as a user does. Yield the process and its address."""
    command = [sys.executable, "-m", "multiverse_hf.cli", "serve", "--port", "0", *options]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stderr.readline()
        found = re.search(r"http://\S+?(?=;|$)", line)
        assert found, line + process.stderr.read()
        if wait:
            line = process.stderr.readline()
            assert line.startswith("ready"), line + process.stderr.read()
        yield process, found[0]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(20)
        process.stderr.close()
