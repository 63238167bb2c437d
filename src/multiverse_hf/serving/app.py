"""The HTTP application: routes, keys, bounds, errors in OpenAI's shape."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from multiverse_hf import __version__
from multiverse_hf.errors import one_line

from .config import ServerConfig
from .metrics import Metrics
from .protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    TokenizeRequest,
    describe_fault,
)
from .reading import check_model, read_chat, read_completion, read_responses, read_tokens
from .replies import chat_chunks, chat_completion, text_chunks, text_completion
from .responses import response_events, whole_response
from .worker import ModelRequest, ModelWorker, Update

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/ready", "/metrics", "/version")  # need no key
BODIES = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
}


def error_response(error: ApiError) -> JSONResponse:
    """Return an error as clients read it."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


class Gate:
    """Lets in requests that have a key and a body within the bounds, and counts them.

    The body is read here as a whole, within a time, so that a slow client holds no more than its connection.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in config.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, begun = 0, time.monotonic()
        state = scope.setdefault("state", {})

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check_key(scope)
            body = await self._read(scope, receive)
            if body is None:
                return  # the client went away
            await self.app(scope, replay(body, receive), note)
        except ApiError as err:
            await error_response(err)(scope, receive, note)
        except Exception:  # the answer is made outside of this
            status = status or 500
            raise
        finally:
            path = scope["path"] if scope["path"] in (*BODIES, *OPEN_PATHS, "/v1/models") else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            if self.config.log is not None:
                user = f" user={state['user']!r}" if state.get("user") is not None else ""
                seconds = time.monotonic() - begun
                self.config.log(f"{scope['method']} {scope['path']!r:.80} {status} {seconds:.2f} s{user}")

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        fits = [hmac.compare_digest(digest, each) for each in self._keys]  # all of them: takes equally long
        if kind.lower() != b"bearer" or not any(fits):
            raise ApiError(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                           code="invalid_api_key")  # fmt: skip

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        most = self.config.max_body
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            self._refuse_size(int(declared))
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.config.read_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        self._refuse_size(size)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(
                408, f"the request did not arrive within {self.config.read_timeout:g} s; send it faster"
            ) from None

    def _refuse_size(self, size: int) -> None:
        raise ApiError(413, f"the body has {size} bytes or more; at most {self.config.max_body} are taken")


def replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body first, and then what comes."""
    rest = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return rest.pop() if rest else await receive()

    return again


class EventStream(StreamingResponse):
    """Server-sent events; the generator is closed with the response, however that ends."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()


async def _while_connected(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """Return an answer; if the client goes away before, the work is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(await task) if task.done() else Response(status_code=499)
    finally:
        for each in (task, watch):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


async def _stream(lines: Callable[[AsyncIterator[Update]], AsyncIterator[str]], updates: Any) -> Response:
    """Return a stream. What fails before its first update is an ordinary error."""
    first = await anext(updates)

    async def again() -> AsyncIterator[Update]:
        yield first
        async for update in updates:
            yield update

    async def guarded() -> AsyncIterator[str]:
        try:
            async for line in lines(again()):
                yield line
        except ApiError as err:
            yield f"data: {json.dumps(err.body())}\n\n"
        finally:
            await updates.aclose()

    return EventStream(guarded(), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def create_app(worker: ModelWorker, config: ServerConfig, metrics: Metrics) -> FastAPI:
    """Return the application of a server.

    Args:
        worker: answers; its model may still be loading.
        config: bounds and keys.
        metrics: what ``/metrics`` shows.
    """
    app = FastAPI(title="multiverse_hf", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, config=config, metrics=metrics)
    if config.cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(config.cors), allow_methods=["*"], allow_headers=["*"])

    async def ask(
        request: Request,
        body: Any,
        read: Callable[..., ModelRequest],
        whole: Callable[..., Any],
        stream: Callable[..., Any],
    ) -> Response:
        worker.check_ready()
        check_model(body.model, config)
        asked = await asyncio.to_thread(read, body, worker.checkpoint, config)
        request.state.user = body.user
        if not body.stream:
            return await _while_connected(request, whole(worker, body, asked))
        return await _stream(lambda updates: stream(worker, body, asked, updates), worker.answer(asked))

    responses = {code: {"description": "an error, in OpenAI's shape"} for code in (400, 401, 404, 408, 413, 429, 503)}

    @app.post("/v1/chat/completions", responses=responses)
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await ask(request, body, read_chat, chat_completion, chat_chunks)

    @app.post("/v1/completions", responses=responses)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await ask(request, body, read_completion, text_completion, text_chunks)

    @app.post("/v1/responses", responses=responses)
    async def respond(body: ResponsesRequest, request: Request) -> Response:
        return await ask(request, body, read_responses, whole_response, response_events)

    @app.get("/v1/models", responses=responses)
    async def models() -> dict[str, Any]:
        context = None if worker.checkpoint is None else worker.context
        card = {"id": config.name, "object": "model", "created": 0, "owned_by": "multiverse_hf"}
        card |= {"max_model_len": context, "multiverse": worker.record}
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", responses=responses)
    async def model(name: str) -> dict[str, Any]:
        check_model(name, config)
        return (await models())["data"][0]

    @app.post("/tokenize", responses=responses)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        worker.check_loaded()
        check_model(body.model, config)
        ids = await asyncio.to_thread(read_tokens, body, worker.checkpoint, config)
        return {"tokens": ids, "count": len(ids), "max_model_len": worker.context}

    @app.get("/health", responses={503: {"description": "steps are due and none is made"}})
    async def health() -> Response:
        return Response(status_code=200 if worker.is_healthy() else 503)

    @app.get("/ready", responses={503: {"description": "requests are not taken now"}})
    async def ready() -> Response:
        try:
            worker.check_ready()
        except ApiError as err:
            return error_response(ApiError(503, str(err), code=err.code, retry_after=err.retry_after))
        return JSONResponse({"status": "ready", "model": config.name})

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def misread(request: Request, error: RequestValidationError) -> Response:
        body: type[BaseModel] | None = BODIES.get(request.url.path)
        return error_response(describe_fault(error.errors(), body))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        reasons = {
            404: f"there is no path {request.url.path!r:.200}; this server has {', '.join((*BODIES, '/v1/models'))}",
            405: f"{request.url.path:.200} takes no {request.method}",
            400: "the body cannot be parsed; send JSON in UTF-8, uncompressed, with ordinary numbers and nesting",
        }
        message = reasons.get(error.status_code, str(error.detail))
        response = error_response(ApiError(error.status_code, message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        logger.error("%s failed", request.url.path, exc_info=error)
        return error_response(ApiError(500, f"the server failed: {one_line(error, 200)}"))

    return app
