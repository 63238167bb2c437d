"""What the engine gives for a request: a handle while it is on its way, and its result."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .sampling import TokenScores
from .state import BranchEvent, FinishReason, GenerationStats, Sequence


@dataclass(frozen=True, slots=True)
class MultiverseResult:
    """One finished answer; lists are in document order, one item a token.

    Attributes:
        prompt_ids: token ids of the prompt.
        ids: token ids of the answer, paths one after the other.
        text: the answer without the tokenizer's special tokens; None without a tokenizer.
        sampled: True where the model chose the token, False where the engine wrote it.
        branches: label of the branch that wrote it, e.g. ``"2.1"``.
        scores: with ``logprobs``, how likely the token was; None where it was not chosen.
        logits: with ``output_logits``, the (V,) logits it was chosen from; None where it was not chosen.
        stats: what the answer cost, and why it ended.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    sampled: list[bool]
    branches: list[str]
    scores: list[TokenScores | None] | None
    logits: list[torch.Tensor | None] | None
    stats: GenerationStats

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer ended."""
        return self.stats.finish_reason


class RequestHandle:
    """A request on its way. Iterate over it for its events; ``result()`` waits for the answer.

    In a coroutine use ``async for event in handle`` and ``await handle``. If the task that does so is cancelled, the
    request is cancelled too. A loop that merely ends early leaves it running.
    """

    def __init__(self, cancel: Callable[[Sequence], None]) -> None:
        self._cancel = cancel
        self._sequence: Sequence | None = None
        self._events: list[BranchEvent] = []
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._when_done: list[Callable[[], None]] = []
        self._result: MultiverseResult | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """The answer is complete, or has failed."""
        return self._result is not None or self._error is not None

    def cancel(self) -> None:
        """Have the answer end now: its branches are closed, its memory is given back."""
        sequence = self._sequence  # read once: the engine's thread lets go of it
        if sequence is not None:
            self._cancel(sequence)

    def add_done_callback(self, function: Callable[[], None]) -> None:
        """Have a function called once the answer is complete or has failed, in the engine's thread; at once if it is.

        Keep it short.
        """
        with self._changed:
            if not self.done:
                self._when_done.append(function)
                return
        function()

    def result(self, timeout: float | None = None) -> MultiverseResult:
        """Wait for the answer. One that was cancelled is given as far as it came.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: if it is not complete by then; it goes on.
            Exception: what a logits processor, a stopping criterion or the model raised.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the answer is not complete after {timeout} s")
        if self._error is not None:
            raise self._error
        return self._result

    def __iter__(self) -> Iterator[BranchEvent]:
        at = 0
        while not (self.done and at == len(self._events)):
            with self._changed:
                self._changed.wait_for(functools.partial(self._is_past, at))
            new = self._events[at:]
            yield from new
            at += len(new)
        if self._error is not None:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[BranchEvent]:
        at, task = 0, asyncio.current_task()
        # the loop's body may be what is cancelled, of which this generator is not told
        task.add_done_callback(self._end_with)
        try:
            while not (self.done and at == len(self._events)):
                await self._wait(functools.partial(self._is_past, at))
                for event in self._events[at:]:
                    yield event
                    at += 1
        except asyncio.CancelledError:
            self.cancel()
            raise
        if self._error is not None:
            raise self._error

    def _end_with(self, task: "asyncio.Task[Any]") -> None:
        """Cancel the request of a task that was cancelled."""
        if task.cancelled() and not self.done:
            self.cancel()

    def _is_past(self, at: int) -> bool:
        return len(self._events) > at or self.done

    def __await__(self) -> Generator[Any, None, MultiverseResult]:
        try:
            yield from self._wait(lambda: self.done).__await__()
        except asyncio.CancelledError:  # as with any task that is awaited
            self.cancel()
            raise
        return self.result()

    async def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait in an event loop for what another thread does."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            if condition():
                return
            self._listeners.append(wake)
        try:
            while not condition():
                await changed.wait()
                changed.clear()
        finally:
            with self._changed:
                self._listeners.remove(wake)

    def _notify(self, event: BranchEvent | None = None) -> None:
        with self._changed:
            if event is not None:
                self._events.append(event)
            self._changed.notify_all()
            listeners = list(self._listeners)
            if self.done:
                listeners += self._when_done
                self._when_done = []
        for listener in listeners:
            listener()
