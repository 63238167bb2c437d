"""math-verify in a process with a time limit: some strings make sympy run forever or use all memory."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from multiverse_hf.errors import CommandError
from multiverse_hf.judging.checker import get_checker

TIMEOUT_S = 5.0
START_S = 120.0  # importing sympy takes a second, on a busy machine many
WORKER = Path(__file__).with_name("verifier_worker.py")


class VerifierError(Exception):
    """A comparison without a verdict, with the reason."""


class VerifierTimeout(VerifierError):
    """A comparison that took too long; its process was killed."""


class Verifier:
    """Compares answers in a process, one at a time. A stuck process is killed and replaced.

    Args:
        timeout_s: time limit of a comparison.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

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
        with self._lock:
            process = self._start()
            try:
                process.stdin.write(json.dumps([gold, answer, search]) + "\n")
                process.stdin.flush()
                same, reason = self._read(process, self.timeout_s)
            except (OSError, ValueError) as err:  # it died, usually for lack of memory
                self._stop()
                raise VerifierError("the process that compares answers died") from err
        if reason is not None:
            raise VerifierError(reason)
        return same

    def close(self) -> None:
        """End the process, even during a comparison."""
        if (process := self._process) is not None:
            process.kill()  # a thread that waits for it holds the lock
        with self._lock:
            self._stop()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> "subprocess.Popen[str]":
        if self._process is not None and self._process.poll() is None:
            return self._process
        environment = dict(os.environ)
        if (folder := get_checker()) is not None:
            paths = [str(folder), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # -P: modules beside the worker must not shadow others of the same names
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, bufsize=1, env=environment,
        )  # fmt: skip
        try:
            self._read(self._process, START_S)
        except (OSError, ValueError, VerifierTimeout) as err:
            self._stop()
            raise CommandError(f"math-verify does not start ({err}); try: python -c 'import math_verify'") from err
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
