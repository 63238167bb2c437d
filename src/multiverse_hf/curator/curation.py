"""One trace through the five stages: asked again with the reason where a reply is refused, and rejected in the end."""

import hashlib
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from multiverse_hf.curator.answers import AnswerChecker
from multiverse_hf.curator.assembly import reasoning_of
from multiverse_hf.curator.calls import CallLog
from multiverse_hf.curator.drafts import Draft, Limits, Refusal
from multiverse_hf.curator.options import Settings
from multiverse_hf.curator.replies import Reply, read_result
from multiverse_hf.curator.stages import JUDGE, STAGES, SYSTEM, CuratorStage, read_template
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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trace.

    Attributes:
        draft: as the last stage that was passed left it.
        attempts: all replies, in order.
        stage, refusal: where and why it was rejected; None if it was not.
    """

    draft: Draft
    attempts: Sequence[Attempt]
    stage: str | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Curator:
    """Takes traces through the stages.

    Attributes:
        settings: of the run.
        ask: calls the endpoint.
        log: of the calls made before.
    """

    settings: Settings
    ask: Ask
    answers: AnswerChecker
    log: CallLog

    async def curate(self, trace: Trace) -> Outcome:
        """Make a document of a trace.

        Raises:
            EndpointError, EndpointDown: if no call can be made.
        """
        draft, attempts = Draft.begin(trace, Limits(self.settings.max_distance)), []
        for stage in STAGES:
            try:
                draft = await self._pass(stage, draft, attempts)
            except Refusal as err:
                return Outcome(draft, attempts, stage.name, err)
        return Outcome(draft, attempts)

    async def _pass(self, stage: CuratorStage, draft: Draft, attempts: list[Attempt]) -> Draft:
        """Ask a stage until a reply passes its checks, each time with the reasons why those before did not.

        Raises:
            Refusal: the last one, if none does.
        """
        refused: list[str] = []  # why replies were; a call that was never answered says nothing about one
        for number in itertools.count():
            attempt = Attempt(stage.name, self._call_seed(draft.trace, stage, number))
            attempts.append(attempt)
            try:
                result = read_result(await self._reply(stage, draft, attempt, refused), stage.form)
                return await self._check(stage, draft, result, attempts)
            except Refusal as err:
                attempt.check, attempt.detail = err.check, err.detail
                if err.check != "no answer":
                    refused.append(err.detail)
                if err.is_final or number + 1 == self.settings.max_attempts:
                    raise
        raise AssertionError("unreachable: the loop has no end")

    async def _check(self, stage: CuratorStage, draft: Draft, result: BaseModel, attempts: list[Attempt]) -> Draft:
        """Make all checks of a stage; once there is a document, its answer is one of them."""
        found = stage.check(draft, result)
        if (document := found.document or found.plain) is not None and stage is not JUDGE:
            trace = draft.trace
            await self.answers.check(trace.reasoning, reasoning_of(document), document, trace.answer)
        if stage is STAGES[-1] and self.settings.judge:
            try:
                await self._pass(JUDGE, found, attempts)
            except Refusal as err:  # final to the judge, and not to the stage that is judged
                raise Refusal(err.check, err.detail) from err
        return found

    async def _reply(self, stage: CuratorStage, draft: Draft, attempt: Attempt, refused: Sequence[str]) -> Reply:
        """Give the reply to an attempt: from the log if it was paid for before."""
        body = {
            "model": self.settings.judge_name if stage is JUDGE else self.settings.model,
            "messages": write_messages(stage, draft, refused),
            "seed": attempt.seed,
            **self.settings.request,
        }
        body = {name: value for name, value in body.items() if value is not None}
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
        if (reply := self.log.get(key)) is None:
            reply = await self.ask(body, stage.name, stage.form)
            self.log.put(key, reply)
        attempt.prompt_tokens, attempt.completion_tokens = reply.prompt_tokens, reply.completion_tokens
        attempt.reply = reply.text
        return reply

    def _call_seed(self, trace: Trace, stage: CuratorStage, number: int) -> int:
        """Give an attempt's seed: of the run's, the row and the attempt alone, so that it is the same in any task."""
        digest = hashlib.blake2b(
            f"{self.settings.seed}:{trace.id}:{stage.name}:{number}".encode(), digest_size=4
        ).digest()
        return int.from_bytes(digest, "little") >> 1  # some endpoints take 31 bits only


def write_messages(stage: CuratorStage, draft: Draft, refused: Sequence[str] = ()) -> list[dict[str, str]]:
    """Write what a stage is asked. All stages of a trace begin alike, for endpoints that keep prefixes of prompts."""
    parts = [draft.opening, stage.instructions(draft)]
    if refused:
        reasons = "\n".join(f"- {reason}" for reason in dict.fromkeys(refused))
        parts.append(f"# Replies that were refused\n\n{reasons}\n\nAnswer again, whole, without these faults.")
    return [
        {"role": "system", "content": read_template(*SYSTEM)},
        {"role": "user", "content": "\n\n".join(part.strip() for part in parts)},
    ]
