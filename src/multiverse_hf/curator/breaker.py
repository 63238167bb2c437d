"""A circuit breaker: when an endpoint is down, one call at a time tries it, and all others wait."""

import asyncio
import random
import time

THRESHOLD = 10  # failures in a row; with a fifth of all calls failing by chance that is one in ten million
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0


class EndpointDown(Exception):
    """No call was answered for as long as one may wait."""


class Breaker:
    """Counts failures in a row and holds calls back; one for all calls of a task.

    Attributes:
        is_open: whether the endpoint is held to be down.
        num_opened: how often it was.
    """

    def __init__(self, max_outage_s: float) -> None:
        self.max_outage_s = max_outage_s
        self.num_opened = 0
        self._failures = 0
        self._wait_s = FIRST_WAIT_S
        self._not_before = 0.0  # by time.monotonic()
        self._last_success = time.monotonic()
        self._probe = asyncio.Lock()

    @property
    def is_open(self) -> bool:
        return self._failures >= THRESHOLD

    @property
    def waits_s(self) -> float:
        """How long calls are still held back."""
        return max(0.0, self._not_before - time.monotonic())

    async def enter(self) -> bool:
        """Wait until a call may be made; say whether it is the one that tries an endpoint that is down."""
        while True:
            if not self.is_open:
                if (wait := self.waits_s) <= 0:
                    return False
                await asyncio.sleep(wait * random.uniform(1, 1.1))
                continue
            await self._probe.acquire()
            try:
                if self.is_open:
                    await asyncio.sleep(self.waits_s)
                    return True
            except asyncio.CancelledError:
                self._probe.release()
                raise
            self._probe.release()

    def leave(self, is_probe: bool) -> None:
        """Let the next call try, after one that did."""
        if is_probe:
            self._probe.release()

    def succeed(self) -> None:
        """Take note of an answer."""
        self._failures, self._wait_s, self._last_success = 0, FIRST_WAIT_S, time.monotonic()

    def hold_back(self, seconds: float) -> None:
        """Make no call for some time: the endpoint asked for it.

        Raises:
            EndpointDown: if that is longer than ``max_outage_s``.
        """
        if seconds > self.max_outage_s:
            raise EndpointDown(f"the endpoint asks to wait {seconds:.0f} s; max_outage_s is {self.max_outage_s:g}")
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def fail(self, reason: str) -> None:
        """Take note of a call that was not answered.

        Raises:
            EndpointDown: if none was for ``max_outage_s``.
        """
        self._failures += 1
        self.check(reason)
        if self._failures == THRESHOLD:
            self.num_opened += 1
        if self._failures >= THRESHOLD and self.waits_s <= 0:
            self.hold_back(self._wait_s * random.uniform(0.75, 1.25))
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def check(self, reason: str) -> None:
        """Raise :class:`EndpointDown` if there was no answer for ``max_outage_s``."""
        silent = time.monotonic() - self._last_success
        if silent > self.max_outage_s:
            raise EndpointDown(f"no call was answered for {silent:.0f} s; the last one failed: {reason}")
