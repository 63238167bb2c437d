"""Runs the server: it listens at once, loads the model, answers, and ends what runs before it stops."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from multiverse_hf.errors import FAILURE, CommandError

from .app import create_app
from .config import ServerConfig
from .metrics import Metrics
from .worker import ModelWorker

POLL = 0.05  # seconds between two looks at whether running answers have ended


class DrainingServer(uvicorn.Server):
    """Takes no new requests once it is told to stop, and lets running answers end within a grace time.

    A second signal ends them at once.
    """

    def __init__(self, config: uvicorn.Config, worker: ModelWorker, metrics: Metrics) -> None:
        super().__init__(config)
        self.worker, self.metrics = worker, metrics

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop."""
        if self.worker.is_draining:
            super().handle_exit(sig, frame)
            self.worker.cancel_all()
            return
        self.worker.is_draining = True
        self.metrics.draining.set(1)
        self._captured_signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop now."""
        if self.worker.is_draining and not self.should_exit:
            loop = asyncio.get_running_loop()
            until = loop.time() + self.worker.config.grace
            while self.worker.num_active and loop.time() < until and not self.should_exit:
                await asyncio.sleep(POLL)
            self.worker.cancel_all()
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        CommandError: if the address is taken, or there is none.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048, reuse_port=False)
    except (OSError, OverflowError, UnicodeError) as err:
        raise CommandError(f"cannot listen on {host}:{port}: {err}; choose another --host or --port", FAILURE) from err
    listener.setblocking(False)
    return listener


def run_server(
    config: ServerConfig, load: Callable[[ModelWorker], None], host: str, port: int, tell: Callable[[str], None]
) -> None:
    """Serve until a signal says to stop.

    Args:
        config: bounds and keys.
        load: opens the worker's model; called in a thread, while the server answers that it is not ready.
        host, port: where to listen; port 0 takes a free one.
        tell: called with a line for the user.

    Raises:
        CommandError: if the server cannot listen, or the model cannot be loaded.
    """
    metrics = Metrics()
    worker = ModelWorker(config, metrics)
    app = create_app(worker, config, metrics)
    listener = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    options: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False}
    server = DrainingServer(uvicorn.Config(app, timeout_graceful_shutdown=5, **options), worker, metrics)
    failures: list[BaseException] = []

    def open_model() -> None:
        try:
            load(worker)
        except BaseException as err:
            failures.append(err)
            server.should_exit = True
        else:
            tell(f"ready: {url}/v1 serves {config.name}")

    thread = threading.Thread(target=open_model, daemon=True)
    # uvicorn has its own handlers while it runs, and raises the signal again once it has ended
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        tell(f"listening on {url}; loading the model")
        thread.start()
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        listener.close()
        worker.close()
    if failures:
        raise failures[0]
    tell("stopped")
