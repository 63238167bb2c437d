"""math-verify in a process with a time limit: some strings make sympy run forever or use all memory."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Self

from multiverse_hf.errors import CommandError
from multiverse_hf.judging.checker import get_checker

TIMEOUT_S = 5.0
START_S = 120.0  # importing sympy takes a second, on a busy machine many
WORKER = Path(__file__).with_name("verifier_worker.py")


class VerifierError(Exception):
    """A comparison without a verdict, with the reason."""


class VerifierTimeout(VerifierError):
    """A comparison that took too long; its process was killed."""


class Worker:
    """A script in a process that answers one request at a time. A stuck process is killed and replaced.

    Args:
        script: a worker beside this file, which runs ``serve`` of ``verifier_worker.py``.
        module: the module that it needs, for messages.
        timeout_s: time limit of a request.
    """

    def __init__(self, script: Path, module: str, timeout_s: float = TIMEOUT_S) -> None:
        self.script, self.module, self.timeout_s = script, module, timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, *request: Any, timeout_s: float | None = None) -> Any:
        """Return the reply to a request.

        Raises:
            VerifierTimeout: if it takes too long.
            VerifierError: if there is no reply, with the reason.
            CommandError: if the process does not start.
        """
        with self._lock:
            process = self._start()
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                reply, reason = self._read(process, timeout_s or self.timeout_s)
            except (OSError, ValueError) as err:  # it died, usually for lack of memory
                self._stop()
                raise VerifierError("its process died") from err
        if reason is not None:
            raise VerifierError(reason)
        return reply

    def environment(self) -> dict[str, str]:
        """Return the environment of the process."""
        return dict(os.environ)

    def close(self) -> None:
        """End the process, even during a request."""
        if (process := self._process) is not None:
            process.kill()  # a thread that waits for it holds the lock
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        # -P: modules beside the worker must not shadow others of the same names
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(self.script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1, env=self.environment(),
        )  # fmt: skip
        try:
            self._read(self._process, START_S)
        except (OSError, ValueError, VerifierTimeout) as err:
            self._stop()
            raise CommandError(f"{self.module} does not start ({err}); try: python -c 'import {self.module}'") from err
        return self._process

    def _read(self, process: "subprocess.Popen[str]", timeout_s: float) -> Any:
        """Return one line's JSON value.

        Raises:
            VerifierTimeout: if there is none in time.
            ValueError: if the process ended instead.
        """
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                self._stop()
                raise VerifierTimeout(f"no verdict after {timeout_s:g} s")
        return json.loads(process.stdout.readline())

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # its buffer has no reader any more
                    stream.close()
            self._process = None


class Verifier(Worker):
    """Compares answers with math-verify.

    Args:
        timeout_s: time limit of a comparison.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(WORKER, "math_verify", timeout_s)

    def is_same(self, gold: str, answer: str, *, search: bool = False) -> bool:
        """Return whether math-verify finds an answer equal to the gold one.

        Args:
            gold: one expression.
            answer: another.
            search: both are prose; compare the expressions found in them.

        Raises:
            VerifierTimeout: if it takes too long.
            VerifierError: if it cannot read one of them, or fails.
            CommandError: if math-verify is missing and cannot be installed.
        """
        return self.ask(gold, answer, search)

    def environment(self) -> dict[str, str]:
        """Return the environment, in which math-verify is the version that judges."""
        environment = super().environment()
        if (folder := get_checker()) is not None:
            paths = [str(folder), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        return environment
