"""Where the app's answers come from: a model in this process, or an endpoint. Both put the events of branches."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from multiverse_hf.checkpoints import Checkpoint
from multiverse_hf.data.chains import ONLY_CHAINS, is_problem
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.serving.client import BranchClient, TextPiece, describe_failure
from multiverse_hf.serving.events import EventWriter, StreamEvent
from multiverse_hf.viewing.results import ENGINE_COUNTS

MAX_TIME = 600.0  # seconds of an answer; then its branches are closed


@dataclass(frozen=True, slots=True)
class Question:
    """What a visitor asks.

    Attributes:
        problem: the prompt, without a sentence of record.
        suffix: the sentence at its end.
        structure: treatment of control tags.
        max_new_tokens: limit of the answer's length.
        temperature: 0 for the likeliest token; None for the checkpoint's or the endpoint's own.
        seed: of the sampling; None for a random one.
    """

    problem: str
    suffix: Suffix
    structure: str
    max_new_tokens: int
    temperature: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer: why it failed, if it did, and the engine's counts, if they are known."""

    error: str | None = None
    counts: Mapping[str, Any] = field(default_factory=dict)


# Called with the time and what happened then, in any thread.
Put = Callable[[tuple[float, StreamEvent | Ended]], None]


@dataclass(frozen=True)
class LocalSource:
    """A model of this process, whose engine all visitors share."""

    engine: MultiverseEngine
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """Name of the model, for people."""
        return self.checkpoint.name

    def note(self, problem: str) -> str | None:
        """Return what a visitor has to know about an answer to a problem."""
        return ONLY_CHAINS if self.checkpoint.is_embedded and not is_problem(problem) else None

    def ask(self, question: Question, put: Put) -> Callable[[], None]:
        """Begin an answer. Return the function that cancels it.

        Raises:
            CommandError: if the prompt does not fit the model.
            ValueError: if an option is out of range.
        """
        sampling: dict[str, Any] = {"seed": question.seed}
        if question.temperature is not None:
            sampling["do_sample"] = question.temperature > 0
        if question.temperature:
            sampling["temperature"] = question.temperature
        writer = EventWriter(0, self.checkpoint.decode)
        handle = self.engine.submit(
            self.checkpoint.encode(question.suffix.end(question.problem)),
            on_event=lambda event: put((time.monotonic(), writer.read(event))),
            structure=question.structure,
            max_new_tokens=question.max_new_tokens,
            max_time=MAX_TIME,
            **sampling,
        )

        def end() -> None:
            try:
                stats = handle.result().stats
                ended = Ended(counts={name: getattr(stats, name) for name in ENGINE_COUNTS})
            except Exception as err:  # of the model: a visitor sees it, and others go on
                ended = Ended(f"the answer failed: {one_line(err)}")
            put((time.monotonic(), ended))

        handle.add_done_callback(end)
        return handle.cancel


@dataclass(frozen=True)
class EndpointSource:
    """An endpoint, such as ``multiverse serve``. One that sends no events of branches is shown as plain text."""

    client: BranchClient
    url: str

    @property
    def name(self) -> str:
        """Name of the model, for people."""
        return self.url

    def note(self, problem: str) -> str | None:
        """Return None: of an endpoint's model nothing is known."""
        return None

    def ask(self, question: Question, put: Put) -> Callable[[], None]:
        """Begin an answer. Return the function that cancels it, which takes effect with the next event."""
        own = {"suffix": question.suffix.value, "structure": question.structure}
        own |= {"max_new_tokens": question.max_new_tokens}
        asked = {"temperature": question.temperature, "seed": question.seed}
        sampling = {name: value for name, value in asked.items() if value is not None}
        stopped = threading.Event()

        def read() -> None:
            error, has_events = None, False
            try:
                for event in self.client.stream(question.problem, multiverse=own, **sampling):
                    if stopped.is_set():
                        return  # the connection is closed, and the server cancels the answer
                    if isinstance(event, TextPiece):
                        if has_events:
                            continue
                        event = StreamEvent(kind="token", branch="", text=event.text)
                    else:
                        has_events = True
                    put((time.monotonic(), event))
            except CommandError as err:
                error = str(err)
            except Exception as err:  # what answers at an address may be anything
                error = describe_failure(err, self.url)
            put((time.monotonic(), Ended(error)))

        threading.Thread(target=read, daemon=True).start()
        return stopped.set


Source = LocalSource | EndpointSource
