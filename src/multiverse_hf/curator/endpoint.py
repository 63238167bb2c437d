"""Calls of an OpenAI-compatible endpoint: limited in number, retried where that helps, and counted."""

import asyncio
import email.utils
import errno
import json
import logging
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI, Timeout
from pydantic import BaseModel
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from multiverse_hf.curator.drafts import Refusal
from multiverse_hf.curator.health import CallFailed, Health
from multiverse_hf.curator.options import Settings
from multiverse_hf.curator.replies import Reply, schema_of

logger = logging.getLogger(__name__)

CONNECT_S = 10.0  # for a connection; an answer may take much longer
_WAIT = wait_random_exponential(multiplier=0.5, max=30)  # between attempts of one call, in seconds
_NO_SCHEMA = re.compile("response_format|schema|structured|guided|grammar", re.IGNORECASE)
_NO_SEED = re.compile(r"\bseed\b", re.IGNORECASE)
_OF_THIS_CALL = re.compile("context|too long|length|too large|filter|policy|moderation|flagged|safety", re.IGNORECASE)
_NOT_OFFERED = (400, 404, 415, 422, 501)
_SHOWN = 300  # most characters of an endpoint's message


class EndpointError(Exception):
    """The endpoint refuses all calls of this run: a wrong key, model or address, or no money left."""


class Endpoint:
    """An endpoint. Use it in ``async with``.

    Attributes:
        counts: calls by their result: "answered", "rate limited", "server error", "timeout", "connection", "refused".
        health: holds calls back while the endpoint is down.
        takes_schema: whether requests have a JSON schema; otherwise they ask for fenced JSON.
        takes_seed: whether requests have a seed; some endpoints refuse it.
    """

    def __init__(self, settings: Settings, api_key: str) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.health = Health(settings.max_outage_s)
        self.takes_schema, self.takes_seed = settings.json_schema, True
        self._key = api_key
        self._slots = asyncio.Semaphore(settings.concurrency)
        timeout = Timeout(None, connect=min(settings.timeout_s, CONNECT_S))  # timeout_s covers a whole call
        # no retries of the client: they are not counted, and ignore the state of other calls
        self._client = AsyncOpenAI(base_url=settings.base_url, api_key=api_key, max_retries=0, timeout=timeout)

    async def __aenter__(self) -> "Endpoint":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    @property
    def trouble(self) -> str | None:
        """A message for the user while no call is answered, None otherwise."""
        if (reason := self.health.trouble) is None:
            return None
        until = f"trying again until {self.settings.max_outage_s:g} s have passed"
        return f"calls to {self.settings.base_url} fail: {reason}; {until}"

    async def ask(self, body: Mapping[str, Any], name: str, form: type[BaseModel]) -> Reply:
        """Make a call, with retries.

        Args:
            body: the request, without a ``response_format``.
            name: name of the result.
            form: form of the result.

        Raises:
            Refusal: if this call cannot be answered. The endpoint refused its content, or it failed ``max_retries``
                times while other calls were answered.
            EndpointError: if no call can be answered.
            EndpointDown: if no call was answered for too long.
        """
        failures = 0  # while other calls were answered
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(CallFailed),
            wait=lambda state: self.health.shorten(_WAIT(state)),
            stop=lambda _: failures > self.settings.max_retries,
            reraise=True,
        )
        try:
            async with self._slots:
                async for attempt in retrying:
                    with attempt:
                        try:
                            reply = await self.health.attempt(lambda: self._call(body, name, form))
                            self.counts["answered"] += 1
                            return reply
                        except CallFailed as err:
                            self.counts[err.kind] += 1
                            failures += err.kind != "rate limited" and not self.health.is_down
                            raise
        except CallFailed as err:
            raise Refusal("no answer", f"{failures} tries failed, the last with {err}") from err
        raise AssertionError("unreachable: the last attempt raises")

    async def _call(self, body: Mapping[str, Any], name: str, form: type[BaseModel]) -> Reply:
        """Make one call. If the endpoint does not take a schema or a seed, repeat it without."""
        while True:
            request = self._write(body, name, form)
            try:
                return await self._send(request)
            except APIStatusError as err:  # an endpoint may quote the key, so this error stays out of tracebacks
                status, said = err.status_code, self._hide(_message(err.body or err.response.reason_phrase))
                retry_after_s = _retry_after(err.response.headers)
            if status in _NOT_OFFERED and "response_format" in request and _NO_SCHEMA.search(said):
                self.takes_schema = False
            elif status in _NOT_OFFERED and "seed" in request and _NO_SEED.search(said):
                if self.takes_seed:
                    logger.warning("the endpoint takes no seed; this run continues without")
                self.takes_seed = False
            else:
                raise self._failure(status, said, retry_after_s)

    def _write(self, body: Mapping[str, Any], name: str, form: type[BaseModel]) -> dict[str, Any]:
        """Return a request with a schema, or with the schema in its last message if the endpoint takes none."""
        request, schema = dict(body), schema_of(form)
        if not self.takes_seed:
            request.pop("seed", None)
        if self.takes_schema:
            wanted = {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}
            return request | {"response_format": wanted}
        *before, last = body["messages"]
        text = f"Answer with one JSON object of this schema, between ```json and ```:\n{json.dumps(schema)}"
        return request | {"messages": [*before, {**last, "content": f"{last['content']}\n\n{text}"}]}

    async def _send(self, request: Mapping[str, Any]) -> Reply:
        """Make one call.

        Raises:
            CallFailed: if there was no answer, or an unreadable one.
            APIStatusError: if the endpoint refused it.
        """
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                # as text: not every endpoint's answer has the form and the type that chat.completions.create reads
                text = await self._client.post("/chat/completions", body=request, cast_to=str)
        except APITimeoutError as err:
            raise CallFailed("timeout", f"no connection in {self._client.timeout.connect:g} s") from err
        except TimeoutError as err:
            raise CallFailed("timeout", f"no answer in {self.settings.timeout_s:g} s") from err
        except APIConnectionError as err:
            raise CallFailed("connection", self._hide(_explain(err))) from err
        try:
            return _read(text)
        except (ValueError, LookupError, TypeError, AttributeError):  # the server's fault; it may quote the key
            said = self._hide(text)[:_SHOWN]
        raise CallFailed("server error", f"an unreadable answer: {said}")

    def _failure(self, status: int, said: str, retry_after_s: float) -> Exception:
        """Return the error for a refusal: of this attempt, of this call, or of all calls."""
        message = f"HTTP {status}: {said[:_SHOWN]}"
        if status == 429 and "insufficient_quota" not in said:
            return CallFailed("rate limited", message, retry_after_s)
        if status >= 500 or status in (408, 409, 425):
            return CallFailed("server error", message, retry_after_s)
        # a 403 without such a word may mean a revoked key, which is no fault of the row
        if (status in (400, 413, 422) and self.counts["answered"]) or (
            status in (400, 403, 413, 422) and _OF_THIS_CALL.search(said)
        ):
            self.counts["refused"] += 1
            return Refusal("no answer", message, is_final=True)
        return EndpointError(message)

    def _hide(self, text: str) -> str:
        """Return a message without the key, which an endpoint may quote."""
        return " ".join(text.split()).replace(self._key, "***")


def _explain(error: BaseException) -> str:
    """Return why there was no connection: the innermost cause of the error."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    if isinstance(error, socket.gaierror):
        return f"no such host ({error.strerror})"
    if isinstance(error, OSError) and error.errno in errno.errorcode:
        return os.strerror(error.errno).lower()
    return f"{type(error).__name__}: {error}"


def _read(text: str) -> Reply:
    """Return the reply in an answer. Errors of an unreadable answer are not caught."""
    data = json.loads(text)
    choice, usage = data["choices"][0], data.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counted = (_count(usage.get(f"{kind}_tokens")) for kind in ("prompt", "completion"))
    return Reply(_text(choice["message"].get("content")), choice.get("finish_reason"), *counted)


def _text(content: Any) -> str:
    """Return the text of a message, or of its parts. A lone surrogate becomes a question mark."""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "").encode("utf-8", "replace").decode("utf-8")


def _count(value: Any) -> int:
    """Return a number of tokens, 0 for an invalid one."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 53 else 0


def _message(error: Any) -> str:
    """Return an endpoint's error text: the ``message`` of an OpenAI error, else all of it."""
    is_usual = isinstance(error, dict) and "message" in error
    return f"{error['message']} {error.get('code') or ''}" if is_usual else str(error)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that an endpoint asks to wait, from a number or a date; 0 if it asks for none."""
    value = headers.get("retry-after", "")
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        return max(0.0, float(value)) if value else 0.0
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
