"""One trace through the five stages: asked again with the reason where a reply is refused, and rejected in the end."""

import asyncio
import hashlib
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from multiverse_hf.curator.answers import AnswerChecker
from multiverse_hf.curator.assembly import parallelism
from multiverse_hf.curator.calls import CallLog
from multiverse_hf.curator.drafts import Draft, Limits, Refusal
from multiverse_hf.curator.replies import Reply, read_result
from multiverse_hf.curator.stages import JUDGE, STAGES, SYSTEM, Stage, read_prompt
from multiverse_hf.curator.traces import Trace

Ask = Callable[[Mapping[str, Any], str, type[BaseModel]], Awaitable[Reply]]


@dataclass(slots=True)
class Attempt:
    """One reply.

    Attributes:
        check, detail: why it was refused; None if it was not.
        reply: its text.
    """

    stage: str
    seed: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    check: str | None = None
    detail: str | None = None
    reply: str | None = None


@dataclass(slots=True)
class Outcome:
    """What became of a trace.

    Attributes:
        document: None if it was rejected.
        stage, check, detail: where and why it was.
        parallelism: of the document, in characters.
        attempts: all replies, in order.
    """

    document: str | None = None
    stage: str | None = None
    check: str | None = None
    detail: str | None = None
    distance: float | None = None
    path_distances: list[float] = field(default_factory=list)
    parallelism: float | None = None
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Curator:
    """Takes traces through the stages.

    Attributes:
        model, request: of every call; ``request`` holds further fields of its body.
        judge_model: the model that judges independence, None for no judge.
        seed: of the run.
        max_attempts: how often a stage is asked, at most.
        log: of the calls made before.
    """

    model: str
    request: Mapping[str, Any]
    judge_model: str | None
    seed: int
    max_attempts: int
    limits: Limits
    ask: Ask
    answers: AnswerChecker
    log: CallLog
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, init=False, repr=False)

    async def curate(self, trace: Trace) -> Outcome:
        """Make a document of a trace.

        Raises:
            EndpointError, EndpointDown: if no call can be made.
        """
        draft, outcome = Draft(trace, self.limits), Outcome()
        for stage in STAGES:
            try:
                setattr(draft, stage.name, await self._pass(stage, draft, outcome))
            except Refusal as err:
                outcome.stage, outcome.check, outcome.detail = stage.name, err.check, err.detail
                return outcome
        outcome.document = draft.text
        outcome.distance, outcome.path_distances = draft.distance, draft.path_distances
        outcome.parallelism = parallelism(draft.document)
        return outcome

    async def _pass(self, stage: Stage, draft: Draft, outcome: Outcome) -> BaseModel:
        """Ask a stage until a reply passes its checks, each time with the reasons why those before did not.

        Raises:
            Refusal: the last one, if none does.
        """
        refused: list[str] = []  # why replies were; a call that was never answered says nothing about one
        for number in itertools.count():
            attempt = Attempt(stage.name, self._call_seed(draft.trace, stage, number))
            outcome.attempts.append(attempt)
            try:
                result = read_result(await self._reply(stage, draft, attempt, refused), stage.form)
                await self._check(stage, draft, result, outcome)
                return result
            except Refusal as err:
                attempt.check, attempt.detail = err.check, err.detail
                if err.check != "no answer":
                    refused.append(err.detail)
                if err.is_final or number + 1 == self.max_attempts:
                    raise
        raise AssertionError("unreachable: the loop has no end")

    async def _check(self, stage: Stage, draft: Draft, result: BaseModel, outcome: Outcome) -> None:
        """Make all checks of a stage; once there is a document, its answer is one of them."""
        stage.check(draft, result)
        if draft.plain is not None and stage is not JUDGE:
            trace = draft.trace
            await self.answers.check(trace.reasoning, draft.sequential, draft.document or draft.plain, trace.answer)
        if stage is STAGES[-1] and self.judge_model is not None:
            try:
                await self._pass(JUDGE, draft, outcome)
            except Refusal as err:  # final to the judge, and not to the stage that is judged
                raise Refusal(err.check, err.detail) from err

    async def _reply(self, stage: Stage, draft: Draft, attempt: Attempt, refused: Sequence[str]) -> Reply:
        """Give the reply to an attempt: from the log if it was paid for before."""
        body = {
            "model": self.judge_model if stage is JUDGE else self.model,
            "messages": write_messages(stage, draft, refused),
            "seed": attempt.seed,
            **self.request,
        }
        body = {name: value for name, value in body.items() if value is not None}
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
        if (reply := self.log.get(key)) is None:
            reply = await self.ask(body, stage.name, stage.form)
            self.log.put(key, reply)
            await self._give_way()
        attempt.prompt_tokens, attempt.completion_tokens = reply.prompt_tokens, reply.completion_tokens
        attempt.reply = reply.text
        return reply

    async def _give_way(self) -> None:
        """Let the network go first: calls that wait for the slot that is free now, and replies that came meanwhile.

        What comes next is a millisecond's work on one row. Were all rows whose replies came together worked on one
        after the other, as many slots would stand empty until the last is done.
        """
        async with self._turn:
            await asyncio.sleep(0)

    def _call_seed(self, trace: Trace, stage: Stage, number: int) -> int:
        """Give an attempt's seed: of the run's, the row and the attempt alone, so that it is the same in any task."""
        digest = hashlib.blake2b(f"{self.seed}:{trace.id}:{stage.name}:{number}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "little") >> 1  # some endpoints take 31 bits only


def write_messages(stage: Stage, draft: Draft, refused: Sequence[str] = ()) -> list[dict[str, str]]:
    """Write what a stage is asked. All stages of a trace begin alike, for endpoints that keep prefixes of prompts."""
    parts = [draft.opening, stage.instructions(draft)]
    if refused:
        reasons = "\n".join(f"- {reason}" for reason in dict.fromkeys(refused))
        parts.append(f"# Replies that were refused\n\n{reasons}\n\nAnswer again, whole, without these faults.")
    return [
        {"role": "system", "content": read_prompt(*SYSTEM)},
        {"role": "user", "content": "\n\n".join(part.strip() for part in parts)},
    ]
