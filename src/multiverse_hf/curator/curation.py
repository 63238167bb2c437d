"""One trace through the five stages. A refused reply is asked for again with the reason; too many reject the trace."""

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
        check, detail: why the reply was refused; None if it was accepted.
        reply: text of the reply.
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
    """The result of curating a trace.

    Attributes:
        draft: the draft after the last passed stage.
        attempts: all replies, in order.
        stage, refusal: where and why the trace was rejected; None if it was accepted.
    """

    draft: Draft
    attempts: Sequence[Attempt]
    stage: str | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Curator:
    """Takes traces through the stages.

    Attributes:
        settings: settings of the run.
        ask: calls the endpoint.
        answers: compares answers.
        log: log of earlier calls.
    """

    settings: Settings
    ask: Ask
    answers: AnswerChecker
    log: CallLog

    async def curate(self, trace: Trace) -> Outcome:
        """Curate one trace.

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
        """Ask a stage until a reply passes its checks. Each attempt is told why earlier replies were refused.

        Raises:
            Refusal: the last one, if no reply passes.
        """
        refused: list[str] = []  # reasons of refused replies; a call without an answer adds none
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
        """Run all checks of a stage. Once there is a document, its answer is checked too."""
        found = stage.check(draft, result)
        if (document := found.document or found.plain) is not None and stage is not JUDGE:
            trace = draft.trace
            await self.answers.check(trace.reasoning, reasoning_of(document), document, trace.answer)
        if stage is STAGES[-1] and self.settings.judge:
            try:
                await self._pass(JUDGE, found, attempts)
            except Refusal as err:  # final for the judge, but not for the stage that is judged
                raise Refusal(err.check, err.detail) from err
        return found

    async def _reply(self, stage: CuratorStage, draft: Draft, attempt: Attempt, refused: Sequence[str]) -> Reply:
        """Return the reply to an attempt, from the log if it is there."""
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
        """Return an attempt's seed. It depends only on the run's seed, the row, the stage and the attempt's number."""
        digest = hashlib.blake2b(
            f"{self.settings.seed}:{trace.id}:{stage.name}:{number}".encode(), digest_size=4
        ).digest()
        return int.from_bytes(digest, "little") >> 1  # some endpoints take 31 bits only


def write_messages(stage: CuratorStage, draft: Draft, refused: Sequence[str] = ()) -> list[dict[str, str]]:
    """Return a stage's request. All stages of a trace share a prefix, for endpoints that cache prefixes."""
    parts = [draft.opening, stage.instructions(draft)]
    if refused:
        reasons = "\n".join(f"- {reason}" for reason in dict.fromkeys(refused))
        parts.append(f"# Replies that were refused\n\n{reasons}\n\nAnswer again, whole, without these faults.")
    return [
        {"role": "system", "content": read_template(*SYSTEM)},
        {"role": "user", "content": "\n\n".join(part.strip() for part in parts)},
    ]
