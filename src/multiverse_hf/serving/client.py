"""A client of the endpoint: the chunks of an answer, and its branches' events.

from multiverse_hf.serving.client import BranchClient

client = BranchClient("http://127.0.0.1:8000/v1")
for event in client.stream("A=19-7+12; B=8+15-3; total?"):
    print(event.kind, event.branch, event.text)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
from openai import OpenAI
from openai.types.chat import ChatCompletionChunk

from multiverse_hf.errors import CommandError, one_line

from .config import KEY
from .events import EVENTS_VERSION, StreamEvent, StreamEvents


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A piece of an answer's text in document order.

    Attributes:
        kind: ``"reasoning"`` or ``"content"``.
        choice: index of the answer.
        text: the piece.
    """

    kind: str
    choice: int
    text: str


class BranchClient:
    """Asks an endpoint, and gives the events of branches.

    Args:
        base_url: of the endpoint, with ``/v1``.
        api_key: its key, if it has one.
        model: name of the model; by default the endpoint's first.
        **options: of :class:`openai.OpenAI`.
    """

    def __init__(self, base_url: str, api_key: str | None = None, model: str | None = None, **options: Any) -> None:
        self.openai = OpenAI(base_url=base_url, api_key=api_key or "none", **options)
        self._model = model

    @property
    def model(self) -> str:
        """Name of the model."""
        if self._model is None:
            self._model = self.openai.models.list().data[0].id
        return self._model

    def chunks(self, messages: str | Sequence[dict[str, str]], **options: Any) -> Iterator[ChatCompletionChunk]:
        """Return the chunks of an answer, with the events among them.

        Args:
            messages: text, or chat messages.
            **options: of ``chat.completions.create``; ``multiverse`` is a dict of this server's own.

        Raises:
            openai.APIError: if the endpoint refuses or fails.
        """
        chat = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        body = dict(options.pop("extra_body", None) or {})
        body["multiverse"] = {**options.pop("multiverse", {}), "events": True}
        with self.openai.chat.completions.create(
            model=options.pop("model", None) or self.model, messages=chat, stream=True, extra_body=body, **options
        ) as stream:
            yield from stream

    def stream(self, messages: str | Sequence[dict[str, str]], **options: Any) -> Iterator[StreamEvent | TextPiece]:
        """Return events of branches as they happen, and between them the text in document order.

        Args:
            messages, options: as for :meth:`chunks`.

        Raises:
            ValueError: if the endpoint speaks another version.
            openai.APIError: if the endpoint refuses or fails.
        """
        for chunk in self.chunks(messages, **options):
            told = (chunk.model_extra or {}).get("multiverse")
            if told is not None:
                if told.get("version") != EVENTS_VERSION:
                    raise ValueError(
                        f"the endpoint sends events of version {told.get('version')!r}, not {EVENTS_VERSION}"
                    )
                yield from StreamEvents.model_validate(told).events
            for choice in chunk.choices:
                reasoning = getattr(choice.delta, "reasoning_content", None)
                for kind, text in (("reasoning", reasoning), ("content", choice.delta.content)):
                    if text:
                        yield TextPiece(kind, choice.index, text)


def endpoint_base(url: str) -> str:
    """Return an endpoint's address with its path, which is ``/v1`` if the address has none.

    Raises:
        CommandError: if it is no address.
    """
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise CommandError(f"--url {url!r:.100} is no address; give one such as http://127.0.0.1:8000")
    return url if parts.path.strip("/") else f"{url.rstrip('/')}/v1"


def describe_failure(error: Exception, url: str) -> str:
    """Return one line about what an endpoint did, and the next step."""
    reason = error.body.get("message") if isinstance(getattr(error, "body", None), dict) else None
    reason = one_line(str(reason or error), 300).rstrip(".")
    if isinstance(error, openai.APIConnectionError):
        cause = one_line(error.__cause__ or error, 100).rstrip(".")
        return f"cannot reach {url}: {cause}; check the address, and that the server runs"
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return f"{url} refuses the key; give its key with --api-key or {KEY} ({reason})"
    if isinstance(error, openai.APIStatusError):
        return f"{url} refuses the request ({error.status_code}): {reason}"
    if isinstance(error, IndexError):
        return f"{url} lists no model; name one with --model-name"
    if isinstance(error, openai.APIError):
        return f"{url} failed: {reason}; send the message again"
    return f"{url} sent what no OpenAI endpoint sends: {reason} ({type(error).__name__}); check the address"
