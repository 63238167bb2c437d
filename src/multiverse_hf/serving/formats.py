"""``response_format`` of OpenAI's API: what follows the reasoning keeps to a JSON schema, by a grammar of xgrammar.

An answer may begin with reasoning between the think tags of its family, and blocks may stand in it. There only end
tokens outside every block are masked, which would end the answer without its text. After the reasoning come optional
white space, the text that the format asks for, and an end token. Tags and special tokens are masked in that text. An
answer without reasoning begins with the text. A family without think tags writes the text only.

What a processor masks follows from the ids that a branch sees. So it keeps no state for a row, and is not copied at a
fork. It keeps matchers of the texts that it was called with: a text with one token more costs one token.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from multiverse_hf.errors import install_line, one_line
from multiverse_hf.judging.verifier import VerifierError, VerifierTimeout, Worker
from multiverse_hf.modeling.grammar import IN_GOAL, Scanner, Stage
from multiverse_hf.modeling.tags import TagSet

from .formats_worker import compile_schema
from .schemas import FIELD, read_schema

COMPILE_TIMEOUT_S = 30.0
MAX_GRAMMAR_BYTES = 256 << 20  # of one compiled grammar
MAX_CACHE_BYTES = 512 << 20  # of all that are kept
MAX_GRAMMARS = 256
MAX_MATCHERS = 32  # of one processor; each takes about 350 bytes a token of its text
ANY_OBJECT = '{"type": "object"}'


class FormatCompiler:
    """Makes logits processors from the ``response_format`` of requests. Any thread may call it.

    A schema is first compiled in another process, which is killed if it takes too long. Counted characters such as
    ``maxLength`` can take minutes with a large vocabulary. The process starts with the first schema.

    Args:
        tokenizer: of the model.
        tags: the control tags.
        vocab_size: number of columns of the model's scores.
        end_tokens: tokens that end an answer, all of ``generation_config.eos_token_id``; by default the tokenizer's.
        timeout_s: time limit to compile a schema.

    Raises:
        ImportError: if xgrammar is missing.
        ValueError: if there is no end token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tags: TagSet,
        vocab_size: int,
        end_tokens: Collection[int] | int | None = None,
        timeout_s: float = COMPILE_TIMEOUT_S,
    ) -> None:
        if find_spec("xgrammar") is None:
            raise ImportError(f"response_format needs xgrammar: {install_line('serve')}")
        import xgrammar

        end_tokens = tokenizer.eos_token_id if end_tokens is None else end_tokens
        ends = sorted({end_tokens} if isinstance(end_tokens, int) else set(end_tokens or ()))
        if not ends:
            raise ValueError("no token ends an answer; set eos_token_id in the generation config")
        self.vocabulary = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=vocab_size, stop_token_ids=ends
        )
        special = {*tokenizer.all_special_ids, *tags.control_ids}
        special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self.reader = _Reader(tags, frozenset(ends), vocab_size, frozenset(special - set(ends)))
        self._trial = Worker(Path(__file__).with_name("formats_worker.py"), "xgrammar", timeout_s)
        self._lock = threading.Lock()
        self._grammars: OrderedDict[str, Any] = OrderedDict()

    def compile(self, response_format: dict[str, Any], prompt_length: int) -> "FormatProcessor | None":
        """Return the processor of one request, None where any text will do.

        Args:
            response_format: as OpenAI's API has it, of type ``text``, ``json_object`` or ``json_schema``.
            prompt_length: tokens of the prompt, which the format does not concern.

        Raises:
            ValueError: if the format is not one of these, or its schema cannot be enforced or compiled in time.
        """
        schema = read_format(response_format)
        return None if schema is None else FormatProcessor(self._compile(schema), self.reader, prompt_length)

    def close(self) -> None:
        """End the process that tries schemas."""
        self._trial.close()

    def _compile(self, schema: str) -> Any:
        """Return the compiled grammar of a schema, from the cache if it is there."""
        with self._lock:
            if schema in self._grammars:
                self._grammars.move_to_end(schema)
                return self._grammars[schema]
        if schema != ANY_OBJECT:
            self._try(schema)
        grammar = compile_schema(self.vocabulary, schema)
        with self._lock:
            self._grammars[schema] = grammar
            while len(self._grammars) > MAX_GRAMMARS or self._num_bytes() > MAX_CACHE_BYTES:
                self._grammars.popitem(last=False)
        return grammar

    def _num_bytes(self) -> int:
        return sum(each.memory_size_bytes for each in self._grammars.values())

    def _try(self, schema: str) -> None:
        """Raise ValueError if a schema cannot be compiled within the limits."""
        shown = one_line(schema, 120)
        try:
            size = self._trial.ask(self.vocabulary.serialize_json(), schema)
        except VerifierTimeout as err:
            raise ValueError(
                f"{FIELD} = {shown}: it takes more than {self._trial.timeout_s:g} s to compile; remove minLength, "
                "maxLength and patterns, or make it smaller"
            ) from err
        except VerifierError as err:
            reason = str(err).rpartition(".cc:")[2].partition(": ")[2] or str(err)
            raise ValueError(f"{FIELD} = {shown}: xgrammar cannot compile it ({one_line(reason)})") from err
        if size > MAX_GRAMMAR_BYTES:
            raise ValueError(
                f"{FIELD} = {shown}: its grammar takes {size >> 20} MiB, at most {MAX_GRAMMAR_BYTES >> 20} are kept; "
                "make it smaller"
            )


def read_format(response_format: Any) -> str | None:
    """Return the JSON schema that a ``response_format`` asks for, as text for xgrammar; None for plain text.

    Raises:
        ValueError: if it is not one that OpenAI's API has, or its schema cannot be enforced.
    """
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise ValueError(
            f"response_format.type must be 'text', 'json_object' or 'json_schema', got {one_line(repr(kind), 60)}"
        )
    if kind != "json_schema":
        return None if kind == "text" else ANY_OBJECT
    asked = response_format.get("json_schema")
    if not isinstance(asked, dict) or asked.get("schema") is None:
        raise ValueError(f"{FIELD} is missing, got json_schema = {one_line(repr(asked), 60)}; give a JSON schema")
    return read_schema(asked["schema"])


class FormatProcessor(LogitsProcessor):
    """Masks the tokens that a format does not allow next. Made by :meth:`FormatCompiler.compile`, for one request.

    Attributes:
        is_stateless: its rows are branches of any length, and it is not copied at a fork.
    """

    is_stateless = True

    def __init__(self, grammar: Any, reader: "_Reader", prompt_length: int) -> None:
        self.grammar, self.reader, self.prompt_length = grammar, reader, prompt_length
        self._matchers: OrderedDict[tuple[int, ...], Any] = OrderedDict()  # by the text they have matched
        self._turn = np.zeros(0, dtype=np.int64), 0  # the last prompt seen, and where its last turn begins
        self._bits = torch.zeros(1, -(-reader.vocab_size // 32), dtype=torch.int32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return (N, V) scores, with minus infinity at the tokens that may not be chosen next.

        Nothing may follow a text that does not keep to the format, such as a draft that is about to be rejected.

        Args:
            input_ids: (N, L) int64, the ids that each row sees, in document order.
            scores: (N, V).
        """
        allowed = np.ones(scores.shape, dtype=bool)
        for row, ids in zip(allowed, input_ids.cpu().numpy(), strict=True):
            self._restrict(ids, row)
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)

    def _restrict(self, ids: np.ndarray, allowed: np.ndarray) -> None:
        reader, prompt = self.reader, ids[: self.prompt_length]
        if not np.array_equal(prompt, self._turn[0]):
            self._turn = prompt.copy(), reader.find_turn(prompt)
        begin, in_block = reader.find_text(ids, self.prompt_length, self._turn[1])
        if begin is None:
            if not in_block:  # in a path they only end the path
                allowed[list(reader.ends)] = False
            return
        text = tuple(ids[begin:].tolist())
        if reader.ends.intersection(text):
            return
        allowed[:] = False
        self._allow(text, allowed)
        if reader.may_think(ids, self.prompt_length, self._turn[1]):
            allowed[reader.think] = True

    def _allow(self, text: tuple[int, ...], allowed: np.ndarray) -> None:
        """Set what may follow a text."""
        matcher = self._matcher(text)
        if matcher is None:
            return
        matcher.fill_next_token_bitmask(self._bits)
        bits = np.unpackbits(self._bits.numpy().view(np.uint8), bitorder="little").view(bool)
        width = min(len(allowed), self.reader.vocab_size)
        np.logical_and(bits[:width], self.reader.is_text[:width], out=allowed[:width])

    def _matcher(self, text: tuple[int, ...]) -> Any:
        """Return the matcher that has matched a text, None if it does not keep to the format."""
        matcher, known = self._matchers.pop(text, None), len(text)
        if matcher is None and text:  # of the same text without its last token, which no row goes on from again
            matcher, known = self._matchers.pop(text[:-1], None), len(text) - 1
        if matcher is None:
            matcher, known = self._fork(text)
        while known < len(text) and matcher.accept_token(text[known]):
            known += 1
        self._matchers[text[:known]] = matcher
        if len(self._matchers) > MAX_MATCHERS:
            self._matchers.popitem(last=False)
        return matcher if known == len(text) else None

    def _fork(self, text: tuple[int, ...]) -> tuple[Any, int]:
        """Return a matcher for the longest known beginning of a text, and that beginning's length."""
        from xgrammar import GrammarMatcher

        nearest = max(self._matchers, key=lambda other: _num_shared(other, text), default=())
        shared = _num_shared(nearest, text)
        if not shared:
            return GrammarMatcher(self.grammar), 0
        matcher = self._matchers[nearest].fork()
        if len(nearest) > shared:
            matcher.rollback(len(nearest) - shared)
        return matcher, shared


def _num_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many tokens two texts begin with alike."""
    differ = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(one), len(other)))


class _Reader:
    """Finds in the ids of a row where the reasoning ends.

    Args:
        tags: the control tags.
        ends: tokens that end an answer.
        vocab_size: number of columns of the scores.
        acting: tokens that are no text: tags, and special tokens but the ends.
    """

    def __init__(self, tags: TagSet, ends: frozenset[int], vocab_size: int, acting: frozenset[int]) -> None:
        self.tags, self.ends, self.vocab_size = tags, ends, vocab_size
        self.think = tags.open("think")
        self.is_text = np.ones(vocab_size, dtype=bool)
        self.is_text[[token for token in acting if token < vocab_size]] = False

    def find_text(self, ids: np.ndarray, prompt_length: int, turn: int) -> tuple[int | None, bool]:
        """Return where the text after the reasoning begins, None while it is open; and whether a block is.

        Reasoning that the prompt's last turn leaves open, and a block, go on in the answer. Else only a think tag that
        is the answer's first token opens it.

        Args:
            ids: (L,), what a row sees.
            prompt_length: tokens of the prompt.
            turn: where its last turn begins.
        """
        scanner, roles = Scanner(self.tags), self.tags.roles
        begin, is_thinking, has_thought, is_open = prompt_length, False, False, False
        tags = np.flatnonzero(np.isin(ids[turn:], self.tags.control_ids)) + turn
        for place, token in zip(tags.tolist(), ids[tags].tolist(), strict=True):
            opens_answer = token == self.think and place == prompt_length and not has_thought
            if place >= prompt_length and not is_open and not opens_answer:
                break
            role, opens = roles[token]
            if role == "think" and scanner.stage not in IN_GOAL and not scanner.open_blocks:
                is_thinking, has_thought = opens, True
            scanner.read_tag(token)
            is_open = is_thinking or bool(scanner.open_blocks) or scanner.stage is not Stage.TEXT
            begin = max(place + 1, prompt_length)
        return None if is_open else begin, bool(scanner.open_blocks)

    def may_think(self, ids: np.ndarray, prompt_length: int, turn: int) -> bool:
        """Return whether reasoning may begin next: at the answer's first token, if its turn has none yet."""
        return self.think is not None and len(ids) == prompt_length and self.think not in ids[turn:]

    def find_turn(self, prompt: np.ndarray) -> int:
        """Return where the assistant's turn begins: after the last turn of the user's or the system's."""
        begin = 0
        for opening, end in self.tags.turns:
            if len(prompt) < len(opening):
                continue
            windows = np.lib.stride_tricks.sliding_window_view(prompt, len(opening))
            found = np.flatnonzero((windows == opening).all(axis=1))
            if len(found):
                text = int(found[-1]) + len(opening)
                ended = np.flatnonzero(prompt[text:] == end)
                begin = max(begin, text + int(ended[0]) + 1 if len(ended) else len(prompt))
        return begin
