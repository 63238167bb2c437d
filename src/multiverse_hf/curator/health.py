"""The state of an endpoint, shared by all calls of a task. While it is down, one call at a time tries it."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from multiverse_hf.curator.replies import Reply

THRESHOLD = 10  # failures in a row; if a fifth of all calls fail by chance, that is one in ten million
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 15.0
TOLD_AFTER, TOLD_AFTER_S = 3, 2.0  # failures in a row, and seconds since the first, before users are told


class EndpointDown(Exception):
    """No call was answered for longer than ``max_outage_s``."""


class CallFailed(Exception):
    """A failed call that may be repeated.

    Attributes:
        kind: "rate limited", "server error", "timeout" or "connection".
        retry_after_s: seconds that the endpoint asks to wait; 0 if it does not ask.
    """

    def __init__(self, kind: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.retry_after_s = kind, retry_after_s


class Health:
    """Counts failures in a row and holds calls back.

    Attributes:
        max_outage_s: longest time without an answered call.
        num_outages: number of times the endpoint was down.
    """

    def __init__(self, max_outage_s: float) -> None:
        self.max_outage_s = max_outage_s
        self.num_outages = 0
        self._reason = ""
        self._in_a_row = 0  # failures, including rate limits
        self._faults = 0  # failures without rate limits, which do not mean that an endpoint is down
        self._failing_since = self._not_before = 0.0  # by time.monotonic()
        self._wait_s = FIRST_WAIT_S
        self._on_their_way = 0
        self._probe = asyncio.Lock()

    @property
    def is_down(self) -> bool:
        return self._faults >= THRESHOLD

    @property
    def trouble(self) -> str | None:
        """Why calls fail, if several failed in a row; None otherwise."""
        failing_s = time.monotonic() - self._failing_since
        return self._reason if self._in_a_row >= TOLD_AFTER and failing_s >= TOLD_AFTER_S else None

    async def attempt(self, send: Callable[[], Awaitable[Reply]]) -> Reply:
        """Make a call as soon as the endpoint's state allows.

        Raises:
            CallFailed: if the call failed.
            EndpointDown: if no call was answered for ``max_outage_s``, or the endpoint asks to wait longer.
        """
        if self.is_down:
            async with self._probe:
                if self.is_down:
                    return await self._attempt(send)
        return await self._attempt(send)

    async def _attempt(self, send: Callable[[], Awaitable[Reply]]) -> Reply:
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait * random.uniform(1, 1.1))
        self._on_their_way += 1
        try:
            try:
                reply = await send()
            finally:
                self._on_their_way -= 1
        except CallFailed as err:
            self._fail(err)
            raise
        self._in_a_row, self._faults, self._wait_s = 0, 0, FIRST_WAIT_S
        return reply

    def _fail(self, err: CallFailed) -> None:
        now = time.monotonic()
        if not self._in_a_row:
            self._failing_since = now
        self._in_a_row += 1
        self._reason = str(err)
        if err.retry_after_s > self.max_outage_s:
            wait, most = f"{err.retry_after_s:g} s", f"{self.max_outage_s:g} s"
            raise EndpointDown(f"it asks to wait {wait}, longer than {most}; raise --max-outage, or wait")
        failing_s = now - self._failing_since
        # a pending call may still be answered
        if failing_s >= self.max_outage_s and not self._on_their_way:
            said = f"no call was answered for {failing_s:.0f} s; the last one failed: {self._reason}"
            raise EndpointDown(f"{said}; start it, or correct its address")
        self._not_before = max(self._not_before, now + err.retry_after_s)
        if err.kind == "rate limited":
            return
        self._faults += 1
        self.num_outages += self._faults == THRESHOLD
        if self.is_down and self._not_before <= now:
            self._not_before = now + self.shorten(self._wait_s * random.uniform(0.75, 1.25))
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def shorten(self, wait_s: float) -> float:
        """Return a wait, at most the time until ``max_outage_s`` have passed."""
        left_s = self._failing_since + self.max_outage_s - time.monotonic()
        return min(wait_s, left_s) if self._in_a_row and left_s > 0 else wait_s
