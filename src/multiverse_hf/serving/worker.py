"""The engine behind the endpoint: requests become answers, within the server's bounds."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from transformers import LogitsProcessorList

from multiverse_hf.checkpoints import Attention, Checkpoint, Dtype, load_model
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.modeling.engine_config import EngineConfig
from multiverse_hf.modeling.handles import MultiverseResult, RequestHandle
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.modeling.state import BranchEvent, FinishReason

from .config import ServerConfig
from .formats import FormatCompiler
from .metrics import Metrics
from .penalties import CountPenalty
from .protocol import ApiError
from .text import AnswerText, DecodeIds, Delta, DocumentOrder, remember_short

STUCK = 60.0  # seconds without a step, while one is due, after which the server is no longer healthy


@dataclasses.dataclass(slots=True)
class ModelRequest:
    """A request, read: what the engine is given.

    Attributes:
        prompts: ids of each.
        copies: answers to each.
        options: of :meth:`MultiverseEngine.submit`.
        seed: of the noise.
        num_logprobs: likeliest tokens to name; None for no log-probabilities.
        stops: stop strings.
        frequency, presence: OpenAI's penalties.
        response_format: form of the answer after the reasoning, as a client sends it.
        splits: reasoning is told apart.
    """

    prompts: list[list[int]]
    copies: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    num_logprobs: int | None = None
    stops: Sequence[str] = ()
    frequency: float = 0.0
    presence: float = 0.0
    response_format: dict[str, Any] | None = None
    splits: bool = True


@dataclasses.dataclass(slots=True)
class Update:
    """What is new of one answer.

    Attributes:
        choice: number of the answer in its request.
        deltas: new text.
        events: new events of the engine.
        final: how the answer ended, with the last update.
    """

    choice: int
    deltas: list[Delta]
    events: list[BranchEvent]
    final: "Final | None" = None

    def add(self, deltas: list[Delta]) -> None:
        """Add text. A path that is complete when its turn comes is one piece, not one for each token."""
        for delta in deltas:
            if self.deltas and self.deltas[-1].part == delta.part:
                self.deltas[-1].text += delta.text
                self.deltas[-1].tokens += delta.tokens
            else:
                self.deltas.append(delta)


@dataclasses.dataclass(frozen=True, slots=True)
class Final:
    """How an answer ended."""

    result: MultiverseResult
    finish_reason: str  # OpenAI's
    num_reasoning: int


class Mailbox:
    """Passes things from the engine's thread to the event loop.

    Args:
        filled: of all that share an engine, those that have something new. :func:`deliver` wakes their loop.
    """

    def __init__(self, filled: "collections.deque[Mailbox]") -> None:
        self.loop = asyncio.get_running_loop()
        self.is_listed = False
        self.has_more = asyncio.Event()
        self._filled = filled
        self._items: collections.deque[Any] = collections.deque()

    def put(self, item: Any) -> None:
        """Add an item, in any thread."""
        self._items.append(item)
        if not self.is_listed:
            self.is_listed = True
            self._filled.append(self)

    async def take(self) -> list[Any]:
        """Return all items there are, at least one."""
        while not self._items:
            self.has_more.clear()
            if not self._items:
                await self.has_more.wait()
        return [self._items.popleft() for _ in range(len(self._items))]


def deliver(filled: collections.deque[Mailbox]) -> None:
    """Wake the event loop once for all mailboxes that were filled. Each wake makes it and the engine share the GIL."""
    loops: dict[asyncio.AbstractEventLoop, list[Mailbox]] = {}
    while filled:
        mailbox = filled.popleft()
        mailbox.is_listed = False  # before the wake, so that what is put from now on is listed anew
        loops.setdefault(mailbox.loop, []).append(mailbox)
    for loop, mailboxes in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda mailboxes=mailboxes: [each.has_more.set() for each in mailboxes])


class ModelWorker:
    """Answers requests with one engine.

    Args:
        config: bounds and options of the server.
        metrics: where what happens is counted.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.engine: MultiverseEngine | None = None
        self.checkpoint: Checkpoint | None = None
        self.formats: FormatCompiler | None = None
        self.decode: DecodeIds | None = None
        self.is_draining = False
        self.num_active = 0
        self._lock = threading.Lock()
        self._filled: collections.deque[Mailbox] = collections.deque()
        self._last_step = (-1, time.monotonic())  # number of steps, and when it was first seen

    # Loading and state

    def open(
        self, checkpoint: Checkpoint, dtype: Dtype, attention: Attention, device: str, threads: int | None
    ) -> None:
        """Load the weights and make the engine.

        Raises:
            CommandError: if the checkpoint cannot be used.
        """
        model = load_model(checkpoint, dtype, attention, device, threads)
        try:
            engine = MultiverseEngine(model, checkpoint.tokenizer, EngineConfig(**self.config.engine))
        except ValueError as err:
            raise CommandError(one_line(err)) from err
        ends = model.generation_config.eos_token_id
        with contextlib.suppress(ImportError, ValueError):  # without xgrammar, or an end token, text only
            self.formats = FormatCompiler(checkpoint.tokenizer, checkpoint.tags, model.config.vocab_size, ends)
        engine.add_step_callback(functools.partial(deliver, self._filled))
        self.decode = remember_short(checkpoint.decode)
        self.checkpoint, self.engine = checkpoint, engine
        self.metrics.watch(engine, lambda: self.num_active)

    @property
    def context(self) -> int | None:
        """Positions of the model's context."""
        return getattr(self.checkpoint.config, "max_position_embeddings", None)

    @property
    def record(self) -> dict[str, Any] | None:
        """The model's family and its sampling of record, for clients; None while the model is being loaded."""
        checkpoint = self.checkpoint
        return checkpoint and {"family": checkpoint.tags.names.name, "sampling": checkpoint.record}

    def check_ready(self) -> None:
        """Check that requests are taken.

        Raises:
            ApiError: 503 while the model is being loaded or the server stops, 429 while the queue is full.
        """
        self.check_loaded()
        if self.is_draining:
            raise ApiError(503, "the server is being stopped; ask another one", retry_after=30)
        if self.num_active >= self.config.room:
            self._refuse_full(1)

    def check_loaded(self) -> None:
        """Check that the model is loaded.

        Raises:
            ApiError: 503 if it is not.
        """
        if self.engine is None:
            raise ApiError(503, "the model is being loaded; try again soon", retry_after=5)

    def _refuse_full(self, count: int) -> None:
        raise ApiError(
            429,
            f"{self.num_active} answers are running or waiting, and this request asks for {count}; the server takes "
            f"{self.config.room} at once; try again later",
            code="queue_full",
            retry_after=1,
        )

    def is_healthy(self) -> bool:
        """Return whether steps are made, or none are due."""
        if self.engine is None or not self.num_active:
            return True
        if self.engine.is_closed:
            return False
        now, steps = time.monotonic(), self.engine.memory()["num_steps"]
        if steps != self._last_step[0]:
            self._last_step = steps, now
        return now - self._last_step[1] < STUCK

    # Answering

    def submit(self, asked: ModelRequest, mailbox: Mailbox) -> list[RequestHandle]:
        """Put a request's answers in the engine's queue; their events go to the mailbox. Any thread may.

        Raises:
            ApiError: if the request does not fit the server's bounds, with the numbers.
        """
        count = len(asked.prompts) * asked.copies
        with self._lock:
            if self.num_active + count > self.config.room:
                self._refuse_full(count)
            self.num_active += count
        handles: list[RequestHandle] = []
        try:
            seed = secrets.randbits(62) if asked.seed is None else asked.seed
            for number in range(count):
                prompt = asked.prompts[number // asked.copies]
                handle = self.engine.submit(
                    prompt,
                    seed=seed,
                    occurrence=number % asked.copies,
                    logprobs=asked.num_logprobs,
                    on_event=lambda event, number=number: mailbox.put((number, event)),
                    logits_processor=self._processors(asked, len(prompt)),
                    **asked.options,
                )
                handles.append(handle)
                handle.add_done_callback(lambda number=number: self._finish(mailbox, number))
        except BaseException as err:
            with self._lock:
                self.num_active -= count - len(handles)
            for handle in handles:
                handle.cancel()
            if isinstance(err, ValueError | TypeError):
                raise ApiError(400, one_line(err, 1000)) from err
            if isinstance(err, CommandError):  # the process that compiles schemas does not start
                raise ApiError(503, one_line(err, 1000), retry_after=5) from err
            raise
        return handles

    def _finish(self, mailbox: Mailbox, number: int) -> None:
        with self._lock:
            self.num_active -= 1
        mailbox.put((number, None))
        deliver(self._filled)  # it may have failed outside of a step

    def _processors(self, asked: ModelRequest, prompt_length: int) -> LogitsProcessorList:
        chain = LogitsProcessorList()
        if asked.frequency or asked.presence:
            chain.append(CountPenalty(prompt_length, asked.frequency, asked.presence))
        if asked.response_format is not None:
            if self.formats is None:
                raise ApiError(
                    400, "response_format: this server has no xgrammar and writes text only", "response_format"
                )
            chain.append(self.formats.compile(asked.response_format, prompt_length))
        return chain

    async def answer(self, asked: ModelRequest) -> AsyncIterator[Update]:
        """Answer a request. If the loop over it ends early or is cancelled, so are its answers.

        Raises:
            ApiError: as :meth:`submit`, and if an answer fails.
        """
        mailbox = Mailbox(self._filled)
        begun = time.monotonic()
        handles = await _in_thread(self.submit, asked, mailbox)
        answers = [self._text(asked, asked.prompts[number // asked.copies]) for number in range(len(handles))]
        orders = [DocumentOrder() for _ in handles]
        left, timer = len(handles), self.metrics.timer(begun, len(handles))
        try:
            while left:
                new: dict[int, Update] = {}
                ended: list[int] = []
                for number, event in await mailbox.take():
                    update = new.setdefault(number, Update(number, [], []))
                    if event is None:
                        ended.append(number)
                        continue
                    orders[number].feed(event)
                    update.events.append(event)
                for number, update in new.items():
                    text = answers[number]
                    for event in orders[number].settled():
                        update.add(text.add(event.token, event.scores))
                    if text.is_stopped:
                        handles[number].cancel()
                    timer.note(number, update.events)
                    if number in ended:
                        left -= 1
                        update.add(text.end())
                        update.final = self._final(handles[number], text)
                        timer.end(update.final.result, update.final.finish_reason)
                    if update.deltas or update.events or update.final:
                        yield update
        finally:
            for handle in handles:
                handle.cancel()
            timer.close()

    def _text(self, asked: ModelRequest, prompt: Sequence[int]) -> AnswerText:
        tags = self.checkpoint.tags if asked.splits else None
        opens, closes = (None, None) if tags is None else (tags.open("think"), tags.close("think"))
        marks = [token for token in prompt if token in (opens, closes)]
        begins_inside = bool(marks) and opens is not None and marks[-1] == opens
        return AnswerText(self.decode, tags, self.checkpoint.hidden, asked.stops, begins_inside)

    @staticmethod
    def _final(handle: RequestHandle, text: AnswerText) -> Final:
        try:
            result = handle.result()
        except Exception as err:
            raise ApiError(500, f"the answer failed: {one_line(err, 300)}") from err
        ended = text.is_stopped or result.finish_reason in (FinishReason.STOP, FinishReason.CRITERIA)
        return Final(result, "stop" if ended else "length", text.num_reasoning)

    def close(self) -> None:
        """End the engine and what belongs to it."""
        if self.formats is not None:
            self.formats.close()
        if self.engine is not None:
            self.engine.close()

    def cancel_all(self) -> None:
        """Cancel what is running; the answers end with the next step."""
        if self.formats is not None:
            threading.Thread(target=self.formats.close, daemon=True).start()  # a schema may compile for long
        if self.engine is not None:
            self.engine.cancel_all()


async def _in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a thread; a cancelled caller waits for it, so that what it began can be ended."""
    task = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):  # nobody waits for the reason any more
            for handle in await task:
                handle.cancel()
        raise
