"""Calls of an OpenAI-compatible endpoint: bounded in number, tried again where that helps, counted.

Over aiohttp itself: the openai client takes two to five times the CPU for a call, and its retries are neither counted
nor known to the circuit breaker, and wait a minute at most whatever the endpoint asks for.
"""

import asyncio
import email.utils
import itertools
import json
import logging
import random
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from pydantic import BaseModel

from multiverse_hf.curator.breaker import Breaker
from multiverse_hf.curator.drafts import Refusal
from multiverse_hf.curator.replies import Reply, schema_of

logger = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between tries of one call, doubled each time
_NO_SCHEMA = ("response_format", "schema", "structured", "guided", "grammar")
_OF_THIS_CALL = ("context", "too long", "length", "too large", "filter", "policy", "moderation", "flagged", "safety")
_NOT_OFFERED = (400, 404, 415, 422, 501)
_SHOWN = 300  # characters of an endpoint's message


class EndpointError(Exception):
    """The endpoint takes no call of this run: a wrong key, model or address, or no money left."""


class Endpoint:
    """An endpoint. To be used in ``async with``.

    Attributes:
        counts: calls by what became of them: "answered", "rate limited", "server error", "timeout", "connection",
            "refused".
        breaker: holds calls back while the endpoint is down.
        takes_schema: whether replies are asked for by JSON schema; else as fenced text.
        takes_seed: whether requests say a seed; some endpoints refuse it.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        concurrency: int = 64,
        timeout_s: float = 600.0,
        max_retries: int = 6,
        max_outage_s: float = 900.0,
        takes_schema: bool = True,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.breaker = Breaker(max_outage_s)
        self.takes_schema, self.takes_seed = takes_schema, True
        self.timeout_s, self.max_retries, self.concurrency = timeout_s, max_retries, concurrency
        self._url, self._key = f"{base_url.rstrip('/')}/chat/completions", api_key
        self._slots = asyncio.Semaphore(concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Endpoint":
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.concurrency),
            headers={"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=self.timeout_s),
            proxy=_proxy(self._url),  # trust_env would look it up anew for each call, in another thread
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, body: Mapping[str, Any], name: str, form: type[BaseModel]) -> Reply:
        """Make a call, as often as it takes.

        Args:
            body: the request, without a ``response_format``.
            name, form: of the result.

        Raises:
            Refusal: if this call cannot be answered: refused for what is in it, or failed ``max_retries`` times while
                others did not.
            EndpointError: if no call can be.
            EndpointDown: if none was for long.
        """
        request = self._write(body, name, form)  # not while a slot is held: a call could be on its way in it
        async with self._slots:
            failures = 0
            for tries in itertools.count():
                is_probe = await self.breaker.enter()
                is_behind = (request.has_schema and not self.takes_schema) or (
                    request.has_seed and not self.takes_seed
                )
                if is_behind:  # another call found that out meanwhile
                    request = self._write(body, name, form)
                try:
                    reply = await self._send(request)
                    self.breaker.succeed()
                    self.counts["answered"] += 1
                    return reply
                except _NoSchema:
                    self.takes_schema = False
                    continue
                except _NoSeed:
                    if self.takes_seed:
                        logger.warning("the endpoint takes no seed; this run goes on without")
                    self.takes_seed = False
                    continue
                except _Failed as err:
                    self._take_note(err)
                    failures += err.kind != "rate limited" and not self.breaker.is_open
                    if failures > self.max_retries:
                        raise Refusal("no answer", f"{failures} tries failed, the last with {err}") from err
                    # where the endpoint says how long, the breaker holds all calls back
                    wait = 0.0 if err.retry_after_s else min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**tries)
                finally:
                    self.breaker.leave(is_probe)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable: the loop has no end")

    def _take_note(self, err: "_Failed") -> None:
        """Count a failure, and tell the breaker. A limit on the rate is no sign of an endpoint that is down.

        Raises:
            EndpointDown: if nothing was answered for long.
        """
        self.counts[err.kind] += 1
        if err.retry_after_s:
            self.breaker.hold_back(err.retry_after_s)
        if err.kind == "rate limited":
            self.breaker.check(str(err))
        else:
            self.breaker.fail(str(err))

    async def _send(self, request: "_Request") -> Reply:
        """Make one call."""
        try:
            async with self._session.post(self._url, data=request.data) as response:
                content = await response.read()
                if response.ok:
                    return self._read(content)
                status, retry_after_s = response.status, _retry_after(response.headers)
        except TimeoutError as err:  # aiohttp's own are such as well
            raise _Failed("timeout", f"no answer in {self.timeout_s:g} s") from err
        except (aiohttp.ClientError, OSError) as err:
            raise _Failed("connection", self._hide(f"{type(err).__name__}: {err}")) from err
        said = self._hide(_message(content))
        if request.has_schema and status in _NOT_OFFERED and any(word in said.lower() for word in _NO_SCHEMA):
            raise _NoSchema
        if request.has_seed and status in _NOT_OFFERED and re.search(r"\bseed\b", said, re.IGNORECASE):
            raise _NoSeed
        raise self._failure(status, said, retry_after_s)

    def _write(self, body: Mapping[str, Any], name: str, form: type[BaseModel]) -> "_Request":
        """Ask for a schema; or show it in the last message and ask for fenced text, where the endpoint takes none."""
        schema = schema_of(form)
        if not self.takes_seed:
            body = {field: value for field, value in body.items() if field != "seed"}
        has_seed = "seed" in body
        if self.takes_schema:
            wanted = {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}
            return _Request(json.dumps({**body, "response_format": wanted}).encode(), True, has_seed)
        *before, last = body["messages"]
        text = f"Answer with one JSON object of this schema, between ```json and ```:\n{json.dumps(schema)}"
        messages = [*before, {**last, "content": f"{last['content']}\n\n{text}"}]
        return _Request(json.dumps({**body, "messages": messages}).encode(), False, has_seed)

    def _failure(self, status: int, said: str, retry_after_s: float) -> Exception:
        """Say what a status means."""
        message = f"HTTP {status}: {said[:_SHOWN]}"
        if status == 429 and "insufficient_quota" not in said:
            return _Failed("rate limited", message, retry_after_s)
        if status >= 500 or status in (408, 409, 425):
            return _Failed("server error", message, retry_after_s)
        is_named = any(word in said.lower() for word in _OF_THIS_CALL)
        # without such a word a 403 may be a key that was revoked, which is no fault of the row
        if (status in (400, 413, 422) and self.counts["answered"]) or (status in (400, 403, 413, 422) and is_named):
            self.counts["refused"] += 1
            return Refusal("no answer", message, is_final=True)
        return EndpointError(message)

    def _read(self, content: bytes) -> Reply:
        """Read an answer; what is none is a fault of the server.

        Raises:
            _Failed: then.
        """
        try:
            data = json.loads(content)
            choice, usage = data["choices"][0], data.get("usage")
            usage = usage if isinstance(usage, dict) else {}
            counted = (_count(usage.get(f"{kind}_tokens")) for kind in ("prompt", "completion"))
            return Reply(_text(choice["message"].get("content")), choice.get("finish_reason"), *counted)
        except (ValueError, LookupError, TypeError, AttributeError) as err:
            said = self._hide(_message(content))
            raise _Failed("server error", f"an answer that is none: {said[:_SHOWN]}") from err

    def _hide(self, text: str) -> str:
        """Take the key out of a message, should an endpoint say it."""
        return " ".join(text.split()).replace(self._key, "***")


def _proxy(url: str) -> str | None:
    """Give the proxy that the environment names for an address."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.netloc) else getproxies().get(parts.scheme)


class _Request(NamedTuple):
    """A request's bytes, and whether a schema and a seed are in them."""

    data: bytes
    has_schema: bool
    has_seed: bool


class _NoSchema(Exception):
    """The endpoint takes no schema."""


class _NoSeed(Exception):
    """The endpoint takes no seed."""


class _Failed(Exception):
    """A call that may be made again."""

    def __init__(self, kind: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.kind, self.retry_after_s = kind, retry_after_s


def _text(content: Any) -> str:
    """Give the text of a message: as it stands, or the text of its parts. Half a character becomes a question mark."""
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return str(content or "").encode("utf-8", "replace").decode("utf-8")


def _count(value: Any) -> int:
    """Give a number of tokens, 0 for what is none."""
    return int(value) if isinstance(value, int | float) and 0 <= value < 1 << 53 else 0


def _message(content: bytes) -> str:
    """Give an endpoint's own words: what OpenAI's have in ``error``, else all of it."""
    try:
        data = json.loads(content)
        error = data.get("error", data)
        return f"{error['message']} {error.get('code') or ''}" if isinstance(error, dict) else str(error)
    except (ValueError, LookupError, AttributeError):
        return content[:_SHOWN].decode(errors="replace")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Give the seconds that an endpoint asks to wait: a number or a date; 0 if it asks for none."""
    value = headers.get("retry-after", "")
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        return max(0.0, float(value)) if value else 0.0
    except ValueError:
        date = email.utils.parsedate_tz(value)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0
