"""math-verify in a process with a clock: some strings keep sympy busy for ever, or make it eat all memory."""

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
START_S = 120.0  # sympy alone takes a second to import, on a busy machine many
WORKER = Path(__file__).with_name("verifier_worker.py")


class VerifierError(Exception):
    """A comparison that gave no verdict, with the reason."""


class VerifierTimeout(VerifierError):
    """A comparison that took too long; its process is gone."""


class Verifier:
    """Compares answers in a process, one at a time; a process that is stuck is killed and replaced.

    Args:
        timeout_s: seconds a comparison may take.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def is_same(self, gold: str, answer: str, *, search: bool = False) -> bool:
        """Check whether math-verify holds an answer to be the gold one.

        Args:
            gold: one expression.
            answer: another.
            search: they are prose; look for an expression in each, and be content with what is found.

        Raises:
            VerifierError: if it cannot read one of them, takes too long, or fails; a :class:`VerifierTimeout` where
                it took too long.
            CommandError: if math-verify is not there and cannot be installed.
        """
        with self._lock:
            process = self._start()
            try:
                process.stdin.write(json.dumps([gold, answer, search]) + "\n")
                process.stdin.flush()
                same, reason = self._read(process, self.timeout_s)
            except (OSError, ValueError) as err:  # it died, of a lack of memory as a rule
                self._stop()
                raise VerifierError("the process that compares answers died") from err
        if reason is not None:
            raise VerifierError(reason)
        return same

    def close(self) -> None:
        """End the process, whatever it is at."""
        if (process := self._process) is not None:
            process.kill()  # who waits for it holds the lock
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
        # -P: the modules beside the worker do not stand in for others of their names
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
        """Read one line.

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
                with contextlib.suppress(OSError):  # what is left in its buffer has nobody to go to
                    stream.close()
            self._process = None
