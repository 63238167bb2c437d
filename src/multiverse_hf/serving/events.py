"""What a stream tells of branches, beside the ordinary chunks. The form is stable within a version."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from multiverse_hf.modeling.state import BranchEvent

from .text import DecodeIds, TokenDecoder

EVENTS_VERSION = 1


class StreamEvent(BaseModel):
    """One event of a branch. Events of an answer come in the order in which they happen."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["token", "fork", "close", "reduce", "finish"] = Field(
        description="a token was written; a block opened paths; a path ended; all paths of a block were merged; the "
        "answer ended"
    )
    branch: str = Field(
        description="label, such as 2.1; empty outside every block. Blocks that follow each other label their paths "
        "alike: each fork begins anew"
    )
    text: str | None = Field(
        None, description="of a token: the text it adds to its branch; empty while a character is incomplete"
    )
    token: int | None = Field(None, description="of a token: its id")
    position: int | None = Field(None, description="of a token: its position id")
    sampled: bool | None = Field(None, description="of a token: the model chose it; false where the engine wrote it")
    logprob: float | None = Field(None, description="of a sampled token, where logprobs were asked for, in nats")
    entropy: float | None = Field(None, description="of the distribution it was chosen from, in nats")
    num_paths: int | None = Field(None, description="of a fork: paths that it opens, labelled 1, 2, ...")
    finish_reason: str | None = Field(
        None, description="of finish: why the answer ended; of close: the limit that closed the path, if one did"
    )


class StreamEvents(BaseModel):
    """The key ``multiverse`` of a chunk."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = EVENTS_VERSION
    choice: int = Field(description="index of the choice")
    events: list[StreamEvent]


class EventWriter:
    """Writes the events of one answer as JSON."""

    def __init__(self, choice: int, decode: DecodeIds) -> None:
        self.choice, self._decode = choice, decode
        self._decoders: dict[str, TokenDecoder] = {}

    def write(self, events: Sequence[BranchEvent]) -> dict[str, Any]:
        """Return the JSON form of some events."""
        written = StreamEvents(choice=self.choice, events=[self.read(event) for event in events])
        return written.model_dump(exclude_none=True)

    def read(self, event: BranchEvent) -> StreamEvent:
        """Return an event with the text that it adds."""
        if event.kind == "token":
            decoder = self._decoders.setdefault(event.branch, TokenDecoder(self._decode))
            scores = event.scores
            return StreamEvent(
                kind="token", branch=event.branch, text=decoder.add(event.token), token=event.token,
                position=event.position, sampled=event.sampled, logprob=scores and scores.logprob,
                entropy=scores and scores.entropy,
            )  # fmt: skip
        if event.kind == "fork":
            prefix = f"{event.branch}." if event.branch else ""
            for number in range(1, event.num_paths + 1):
                self._decoders.pop(f"{prefix}{number}", None)
        reason = event.finish_reason and str(event.finish_reason)
        return StreamEvent(
            kind=event.kind, branch=event.branch, num_paths=event.num_paths or None, finish_reason=reason
        )
