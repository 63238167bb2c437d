"""Answers in the form of OpenAI's chat and text completions, whole and as a stream."""

import functools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from openai.types import Completion, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic_core import to_json

from .events import EventWriter
from .protocol import ChatRequest, Completing, CompletionRequest, StreamOptions
from .text import CONTENT, INCOMPLETE, REASONING, Delta, TextToken
from .worker import Final, ModelRequest, ModelWorker, Update

TEXT_MARK = uuid.uuid4().hex  # stands for the text in a chunk that is made once
DONE = "data: [DONE]\n\n"


def sse(value: Any, event: str | None = None) -> str:
    """Return a server-sent event of a JSON text."""
    return f"data: {value}\n\n" if event is None else f"event: {event}\ndata: {value}\n\n"


def stats_of(finals: Sequence[Final]) -> dict[str, Any]:
    """Return what answers cost: of several the sums, of length and steps the greatest."""
    stats = [final.result.stats for final in finals]
    length = sum(each.length for each in stats)
    return {
        "length": max(each.length for each in stats),
        "parallelism": round(sum(each.num_tokens for each in stats) / length, 4) if length else 1.0,
        "num_forks": sum(each.num_forks for each in stats),
        "num_steps": max(each.num_steps for each in stats),
        "max_width": max(each.max_width for each in stats),
    }


def usage_of(asked: ModelRequest, finals: Sequence[Final]) -> dict[str, Any]:
    """Return OpenAI's usage, with what branches add under ``multiverse``."""
    prompt = sum(map(len, asked.prompts))
    completion = sum(final.result.stats.num_tokens for final in finals)
    usage = CompletionUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        completion_tokens_details={"reasoning_tokens": sum(final.num_reasoning for final in finals)},
        multiverse=stats_of(finals),
    )
    return usage.model_dump(exclude_unset=True)


class StreamUsage:
    """What the chunks of a stream say of usage, apart from the last: nothing, null, or with vLLM's option how much."""

    def __init__(self, body: Completing, asked: ModelRequest) -> None:
        self.options = body.stream_options or StreamOptions()
        self.num_prompt, self.num_written = sum(map(len, asked.prompts)), 0

    def add(self, update: Update) -> None:
        """Count what is new."""
        self.num_written += sum(event.kind == "token" for event in update.events)

    def fields(self) -> dict[str, Any]:
        """Return the fields of a chunk."""
        if not self.options.include_usage:
            return {}
        if not self.options.continuous_usage_stats:
            return {"usage": None}
        total = self.num_prompt + self.num_written
        usage = {"prompt_tokens": self.num_prompt, "completion_tokens": self.num_written, "total_tokens": total}
        return {"usage": usage}


def ended_of(final: Final) -> dict[str, Any]:
    """Return how one answer ended, in this server's own terms."""
    stats = final.result.stats
    return {"finish_reason": str(stats.finish_reason), "num_closed": stats.num_closed, **stats_of([final])}


def logprobs_of(tokens: Sequence[TextToken], worker: ModelWorker) -> list[dict[str, Any]]:
    """Return log-probabilities as chat completions have them. A token that the engine wrote is certain."""
    return [
        _logprob(each.text, 0.0 if each.scores is None else each.scores.logprob)
        | {
            "top_logprobs": []
            if each.scores is None
            else [_logprob(worker.decode([token]), value) for token, value in each.scores.top]
        }
        for each in tokens
    ]


def _logprob(text: str, value: float) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": max(value, -9999.0),
        "bytes": None if INCOMPLETE in text else list(text.encode()),
    }


def text_logprobs_of(tokens: Sequence[TextToken], offset: int, num_top: int, worker: ModelWorker) -> dict[str, Any]:
    """Return log-probabilities as text completions have them.

    Args:
        tokens: the tokens.
        offset: where in the answer their text begins.
        num_top: likeliest tokens to name.
        worker: knows the tokenizer.
    """
    offsets = []
    for each in tokens:
        offsets.append(offset)
        offset += len(each.text)
    tops = [
        {} if each.scores is None else {worker.decode([token]): value for token, value in each.scores.top}
        for each in tokens
    ]
    return {
        "tokens": [each.text for each in tokens],
        "token_logprobs": [0.0 if each.scores is None else each.scores.logprob for each in tokens],
        "top_logprobs": tops if num_top else None,
        "text_offset": offsets,
    }


class Gathered:
    """The parts of whole answers."""

    def __init__(self, count: int) -> None:
        self.texts: list[dict[str, str]] = [{REASONING: "", CONTENT: ""} for _ in range(count)]
        self.tokens: list[list[TextToken]] = [[] for _ in range(count)]
        self.finals: list[Final | None] = [None] * count

    def add(self, update: Update) -> None:
        """Add what is new."""
        for delta in update.deltas:
            self.texts[update.choice][delta.part] += delta.text
            if delta.part == CONTENT:
                self.tokens[update.choice] += delta.tokens
        self.finals[update.choice] = update.final


async def gather_answers(worker: ModelWorker, asked: ModelRequest) -> Gathered:
    """Return whole answers.

    Raises:
        ApiError: as :meth:`ModelWorker.answer`.
    """
    gathered = Gathered(len(asked.prompts) * asked.copies)
    async for update in worker.answer(asked):
        gathered.add(update)
    return gathered


def _named(text: str) -> dict[str, Any]:
    """Return reasoning under both names that clients read."""
    return {"reasoning_content": text, "reasoning": text}


async def chat_completion(worker: ModelWorker, body: ChatRequest, asked: ModelRequest) -> dict[str, Any]:
    """Return a whole chat completion."""
    gathered = await gather_answers(worker, asked)
    choices = []
    for index, (texts, tokens, final) in enumerate(zip(gathered.texts, gathered.tokens, gathered.finals, strict=True)):
        message = {"role": "assistant", "content": texts[CONTENT], "refusal": None}
        if texts[REASONING] and body.include_reasoning is not False:
            message |= _named(texts[REASONING])
        logprobs = {"content": logprobs_of(tokens, worker), "refusal": None} if body.logprobs else None
        choices.append(
            {"index": index, "message": message, "finish_reason": final.finish_reason, "logprobs": logprobs,
             "multiverse": ended_of(final)}
        )  # fmt: skip
    reply = ChatCompletion(
        id=_id("chatcmpl"), object="chat.completion", created=int(time.time()), model=worker.config.name,
        choices=choices, usage=usage_of(asked, gathered.finals),
    )  # fmt: skip
    return reply.model_dump(exclude_unset=True)


def _id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


async def chat_chunks(
    worker: ModelWorker, body: ChatRequest, asked: ModelRequest, updates: AsyncIterator[Update]
) -> AsyncIterator[str]:
    """Return a chat completion as server-sent events."""
    count = len(asked.prompts) * asked.copies
    head = {"id": _id("chatcmpl"), "object": "chat.completion.chunk", "created": int(time.time())}
    head["model"] = worker.config.name
    usage = StreamUsage(body, asked)
    writers = [EventWriter(index, worker.decode) for index in range(count)]
    finals: list[Final] = []

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        value = ChatCompletionChunk(**{**head, "choices": choices, **usage.fields(), **more})
        return sse(value.model_dump_json(exclude_unset=True))

    def choice(index: int, delta: dict[str, Any], logprobs: Any = None, **more: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None, **more}

    def text_of(part: str, text: str) -> dict[str, Any]:
        return _named(text) if part == REASONING else {"content": text}

    @functools.cache
    def around(index: int, part: str) -> list[str]:
        """Return the JSON of a chunk around its text. openai's types make it once, not for each token."""
        return chunk([choice(index, text_of(part, TEXT_MARK))]).split(f'"{TEXT_MARK}"')

    def write(index: int, delta: Delta) -> str | None:
        if delta.part == REASONING and body.include_reasoning is False:
            return None
        has_logprobs = delta.part == CONTENT and body.logprobs
        if not has_logprobs and not usage.options.continuous_usage_stats:
            return to_json(delta.text).decode().join(around(index, delta.part))
        logprobs = {"content": logprobs_of(delta.tokens, worker), "refusal": None} if has_logprobs else None
        return chunk([choice(index, text_of(delta.part, delta.text), logprobs)])

    yield chunk([choice(index, {"role": "assistant", "content": ""}) for index in range(count)])
    async for update in updates:
        usage.add(update)
        if body.multiverse.events and update.events:
            told = writers[update.choice].write(update.events)
            yield chunk([choice(update.choice, {})], multiverse=told)
        for delta in update.deltas:
            if (line := write(update.choice, delta)) is not None:
                yield line
        if (final := update.final) is not None:
            finals.append(final)
            ended = {"finish_reason": final.finish_reason, "multiverse": ended_of(final)}
            yield chunk([{**choice(update.choice, {}), **ended}])
    if usage.options.include_usage:
        yield chunk([], usage=usage_of(asked, finals))
    yield DONE


async def text_completion(worker: ModelWorker, body: CompletionRequest, asked: ModelRequest) -> dict[str, Any]:
    """Return a whole text completion."""
    gathered = await gather_answers(worker, asked)
    choices = []
    for index, (texts, tokens, final) in enumerate(zip(gathered.texts, gathered.tokens, gathered.finals, strict=True)):
        logprobs = None if body.logprobs is None else text_logprobs_of(tokens, 0, body.logprobs, worker)
        choices.append(
            {"index": index, "text": texts[CONTENT], "finish_reason": final.finish_reason, "logprobs": logprobs,
             "multiverse": ended_of(final)}
        )  # fmt: skip
    reply = Completion(
        id=_id("cmpl"), object="text_completion", created=int(time.time()), model=worker.config.name,
        choices=choices, usage=usage_of(asked, gathered.finals),
    )  # fmt: skip
    return reply.model_dump(exclude_unset=True)


async def text_chunks(
    worker: ModelWorker, body: CompletionRequest, asked: ModelRequest, updates: AsyncIterator[Update]
) -> AsyncIterator[str]:
    """Return a text completion as server-sent events."""
    head = {"id": _id("cmpl"), "object": "text_completion", "created": int(time.time()), "model": worker.config.name}
    usage = StreamUsage(body, asked)
    count = len(asked.prompts) * asked.copies
    writers = [EventWriter(index, worker.decode) for index in range(count)]
    offsets, finals = [0] * count, []

    def chunk(index: int | None, text: str, finish_reason: str | None, logprobs: Any = None, **more: Any) -> str:
        parts = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        choices = [] if index is None else [parts]
        return sse(_text_chunk({**head, "choices": choices, **usage.fields(), **more}))

    async for update in updates:
        usage.add(update)
        index = update.choice
        if body.multiverse.events and update.events:
            yield chunk(index, "", None, multiverse=writers[index].write(update.events))
        for delta in update.deltas:
            logprobs = None
            if body.logprobs is not None:
                logprobs = text_logprobs_of(delta.tokens, offsets[index], body.logprobs, worker)
            offsets[index] += len(delta.text)
            yield chunk(index, delta.text, None, logprobs)
        if update.final is not None:
            finals.append(update.final)
            yield chunk(index, "", update.final.finish_reason)
    if usage.options.include_usage:
        yield chunk(None, "", None, usage=usage_of(asked, finals))
    yield DONE


def _text_chunk(value: dict[str, Any]) -> str:
    # openai's type has no chunk of its own, and requires a finish reason that a chunk has not yet
    return Completion.model_construct(**value).model_dump_json(exclude_unset=True, warnings=False)
