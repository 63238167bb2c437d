"""Answers in the form of OpenAI's Responses API, whole and as a stream."""

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from openai.types import responses as types

from .protocol import ResponsesRequest
from .replies import ended_of, gather_answers, sse, stats_of
from .text import CONTENT, REASONING
from .worker import Final, ModelRequest, ModelWorker, Update


class ResponseWriter:
    """Makes the parts of one response.

    Args:
        worker: answers.
        body: the request.
        asked: the request, read.
    """

    def __init__(self, worker: ModelWorker, body: ResponsesRequest, asked: ModelRequest) -> None:
        self.worker, self.body, self.asked = worker, body, asked
        self.id, self.created = f"resp_{uuid.uuid4().hex}", time.time()
        self.item_ids = {REASONING: f"rs_{uuid.uuid4().hex}", CONTENT: f"msg_{uuid.uuid4().hex}"}

    def item(self, part: str, text: str, status: str) -> dict[str, Any]:
        """Return an item of the output."""
        head = {"id": self.item_ids[part], "status": status}
        if part == REASONING:
            content = [] if status == "in_progress" else [{"type": "reasoning_text", "text": text}]
            return {**head, "type": "reasoning", "summary": [], "content": content}
        content = [] if status == "in_progress" else [self.part(CONTENT, text)]
        return {**head, "type": "message", "role": "assistant", "content": content}

    @staticmethod
    def part(part: str, text: str) -> dict[str, Any]:
        """Return the content of an item."""
        if part == REASONING:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def response(self, status: str, output: list[dict[str, Any]], final: Final | None = None) -> types.Response:
        """Return the response as it is now."""
        body = self.body
        more: dict[str, Any] = {}
        if final is not None:
            stats, prompt = final.result.stats, len(self.asked.prompts[0])
            more["usage"] = {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": stats.num_tokens,
                "output_tokens_details": {"reasoning_tokens": final.num_reasoning},
                "total_tokens": prompt + stats.num_tokens,
                "multiverse": stats_of([final]),
            }
            more["multiverse"] = ended_of(final)
            if status == "incomplete":
                more["incomplete_details"] = {"reason": "max_output_tokens"}
        return types.Response(
            id=self.id, object="response", created_at=self.created, model=self.worker.config.name, status=status,
            output=output, instructions=body.instructions, max_output_tokens=body.max_output_tokens,
            temperature=body.temperature, top_p=body.top_p, parallel_tool_calls=False, tool_choice="none", tools=[],
            metadata={}, truncation="disabled", store=False, **{"error": None, "incomplete_details": None, **more},
        )  # fmt: skip


def _status(final: Final) -> str:
    return "completed" if final.finish_reason == "stop" else "incomplete"


async def whole_response(worker: ModelWorker, body: ResponsesRequest, asked: ModelRequest) -> dict[str, Any]:
    """Return a whole response."""
    gathered = await gather_answers(worker, asked)
    writer, final, texts = ResponseWriter(worker, body, asked), gathered.finals[0], gathered.texts[0]
    status = _status(final)
    output = [writer.item(REASONING, texts[REASONING], status)] if texts[REASONING] else []
    output.append(writer.item(CONTENT, texts[CONTENT], status))
    return writer.response(status, output, final).model_dump(exclude_unset=True)


async def response_events(
    worker: ModelWorker, body: ResponsesRequest, asked: ModelRequest, updates: AsyncIterator[Update]
) -> AsyncIterator[str]:
    """Return a response as server-sent events."""
    writer, number = ResponseWriter(worker, body, asked), 0
    output: list[dict[str, Any]] = []
    now: str | None = None  # the part that is being written
    text = ""

    def tell(kind: type[Any], name: str, **fields: Any) -> str:
        nonlocal number
        event = kind(type=name, sequence_number=number, **fields)
        number += 1
        return sse(event.model_dump_json(exclude_unset=True), name)

    def where(part: str) -> dict[str, Any]:
        return {"item_id": writer.item_ids[part], "output_index": len(output), "content_index": 0}

    def begin(part: str) -> list[str]:
        item = {"item": writer.item(part, "", "in_progress"), "output_index": len(output)}
        return [
            tell(types.ResponseOutputItemAddedEvent, "response.output_item.added", **item),
            tell(
                types.ResponseContentPartAddedEvent, "response.content_part.added", part=writer.part(part, ""),
                **where(part),
            ),
        ]  # fmt: skip

    def end(part: str, status: str) -> list[str]:
        if part == REASONING:
            done = tell(types.ResponseReasoningTextDoneEvent, "response.reasoning_text.done", text=text, **where(part))
        else:
            done = tell(
                types.ResponseTextDoneEvent, "response.output_text.done", text=text, logprobs=[], **where(part)
            )
        item = writer.item(part, text, status)
        lines = [
            done,
            tell(
                types.ResponseContentPartDoneEvent, "response.content_part.done", part=writer.part(part, text),
                **where(part),
            ),
            tell(types.ResponseOutputItemDoneEvent, "response.output_item.done", item=item, output_index=len(output)),
        ]  # fmt: skip
        output.append(item)
        return lines

    begun = writer.response("in_progress", [])
    yield tell(types.ResponseCreatedEvent, "response.created", response=begun)
    yield tell(types.ResponseInProgressEvent, "response.in_progress", response=begun)
    async for update in updates:
        for delta in update.deltas:
            if delta.part != now:
                if now is not None:
                    for line in end(now, "completed"):
                        yield line
                now, text = delta.part, ""
                for line in begin(now):
                    yield line
            text += delta.text
            if now == REASONING:
                yield tell(
                    types.ResponseReasoningTextDeltaEvent, "response.reasoning_text.delta", delta=delta.text,
                    **where(now),
                )  # fmt: skip
            else:
                yield tell(
                    types.ResponseTextDeltaEvent, "response.output_text.delta", delta=delta.text, logprobs=[],
                    **where(now),
                )  # fmt: skip
        if update.final is not None:
            status = _status(update.final)
            if now is not None and now != CONTENT:
                for line in end(now, status):
                    yield line
                now = None
            if now is None:  # an answer without content has an empty message
                now, text = CONTENT, ""
                for line in begin(now):
                    yield line
            for line in end(now, status):
                yield line
            kind = types.ResponseCompletedEvent if status == "completed" else types.ResponseIncompleteEvent
            yield tell(kind, f"response.{status}", response=writer.response(status, output, update.final))
