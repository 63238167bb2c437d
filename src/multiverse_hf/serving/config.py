"""Options of the server."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import CommandError

KEY = "MULTIVERSE_API_KEY"


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """What the server takes, and how much of it.

    Args:
        name: the model's name for clients.
        keys: API keys; with none, everyone may ask.
        suffix: sentence of record at the end of the last user message, where a request does not say.
        max_new_tokens: bound on an answer's length, and the length where a request names no limit.
        max_total_tokens: bound on the tokens of an answer, all paths together.
        max_choices: answers that one request may ask for.
        max_branches: branches of an answer that are written at once.
        max_queue: answers that wait beside those that the engine writes.
        max_body: bytes of a request.
        read_timeout: seconds that a client may take to send a request.
        max_time: seconds for an answer; then its branches are closed.
        grace: seconds that running answers have to end, once the server is told to stop.
        cors: origins whose pages may call; none by default.
        log: called with a line for each request, if it is given.
        engine: options of :class:`~multiverse_hf.modeling.engine_config.EngineConfig`.
    """

    name: str
    keys: tuple[str, ...] = ()
    suffix: Suffix = Suffix.NONE
    max_new_tokens: int = 4096
    max_total_tokens: int = 65536
    max_choices: int = 16
    max_branches: int = 256
    max_queue: int = 256
    max_body: int = 4 << 20
    read_timeout: float = 30.0
    max_time: float = 600.0
    grace: float = 30.0
    cors: tuple[str, ...] = ()
    log: Callable[[str], None] | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def room(self) -> int:
        """Answers that may run or wait."""
        return self.engine.get("max_num_seqs", 64) + self.max_queue


def read_keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    """Return the API keys of the options, a file and the environment.

    Raises:
        CommandError: if a key is empty or no line of a header, or the file cannot be read.
    """
    keys = list(given)
    if os.environ.get(KEY):
        keys.append(os.environ[KEY])
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise CommandError(f"cannot read --api-key-file {file}: {err}; check the path") from err
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise CommandError(f"--api-key-file {file} holds no key; write one on a line, or leave the option out")
        keys += found
    for key in keys:
        if not key.strip() or not key.isascii() or not key.isprintable() or " " in key:
            raise CommandError("an API key must be printable ASCII without spaces; choose another")
    return tuple(dict.fromkeys(keys))
