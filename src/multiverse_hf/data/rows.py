"""From a record to the token ids and labels of a training row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import takewhile
from typing import Any

from multiverse_hf.data.records import Form, Reason, Record, RowError
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.modeling.grammar import Stage, Structure
from multiverse_hf.modeling.labels import IGNORE, find_forced
from multiverse_hf.modeling.tags import TagSet, encode_inside, encode_prompt


class TokenKind(IntEnum):
    """The part of a row that a token belongs to; training reports its loss by kind."""

    PROMPT = 0
    TAG = 1  # a control tag, and the newlines between tags of a block
    GOAL = 2  # goals and their outlines
    PATH = 3  # a path's own text
    CONCLUSION = 4
    THINK = 5  # reasoning outside every block
    ANSWER = 6  # text outside <Think> and blocks, including the end token


KIND_BY_ROLE = {  # by the role of the innermost element
    "think": TokenKind.THINK,
    "parallel": TokenKind.TAG,
    "goal": TokenKind.GOAL,
    "outline": TokenKind.GOAL,
    "path": TokenKind.PATH,
    "conclusion": TokenKind.CONCLUSION,
}


def document_labels(ids: list[int], tags: TagSet) -> list[int]:
    """Return the labels of a document: only tokens that the model must choose have one.

    Tokens that the engine writes, ``\\n<Path>\\n1:`` at a fork and ``\\n<Conclusion>\\n`` at a reduce, are ignored.
    The first token of every path and the first token after a block are ignored too: in document order they have no
    meaningful predecessor.

    Args:
        ids: token ids of the document.
        tags: the control tags.

    Returns:
        As many labels as ids, :data:`IGNORE` for ignored tokens.
    """
    labels = list(ids)
    for run in find_forced(ids, tags):
        labels[run.start : run.stop] = [IGNORE] * len(run)
    return labels


def token_kinds(ids: list[int], tags: TagSet) -> tuple[list[TokenKind], list[bool]]:
    """Return the kind of every token of a document.

    Args:
        ids: token ids of the document.
        tags: the control tags.

    Returns:
        The kind of each token, and whether a block is still open after it.
    """
    kinds: list[TokenKind] = []
    is_open: list[bool] = []
    begin, end = tags.ids[tags.names.opener], tags.ending[-1]
    stack: list[str] = []
    num_blocks = 0
    for token in ids:
        role, opens = tags.roles.get(token, (None, False))
        if role is None:
            kinds.append(KIND_BY_ROLE[stack[-1]] if stack else TokenKind.ANSWER)
        else:
            kinds.append(TokenKind.TAG)
            num_blocks += (token == begin) - (token == end)
            if opens:
                stack.append(role)
            elif role in stack:
                del stack[len(stack) - 1 - stack[::-1].index(role) :]
        is_open.append(num_blocks > 0)
    return kinds, is_open


def with_forced_starts(ids: list[int], text: str, tokenizer: Any, tags: TagSet) -> list[int]:
    """Return the ids of a document in which every path and conclusion begins with the ids that the engine writes.

    A tokenizer may join the end of ``\\n<Path>\\n1:`` with the next text: Qwen2.5 and Llama 3 have a token ``:\\n``.
    The engine encodes that start separately, so training must read it the same way.

    Args:
        ids: ids of the whole text.
        text: the document.
        tokenizer: the tokenizer that encoded it.
        tags: the control tags.
    """
    found = list(re.finditer("|".join(map(re.escape, tags.names.tokens)), text))
    ends = [*(match.start() for match in found), len(text)][1:]
    after = [text[match.end() : end] for match, end in zip(found, ends, strict=True)]
    at = [index for index, token in enumerate(ids) if token in tags.roles]
    if len(at) != len(after):  # the text contains a tag that is no token
        return ids
    structure, whole = Structure(tags), list(ids[: at[0]] if at else ids)
    for number, index in enumerate(at):
        end = at[number + 1] if number + 1 < len(at) else len(ids)
        token, rest = ids[index], ids[index + 1 : end]
        forced: list[int] = []
        if token == tags.open("path") and structure.stage is Stage.FORKED:
            prefix = structure.path_prefix(structure.open_blocks[-1].path)
            forced = prefix[prefix.index(token) + 1 :]
        elif token in tags.reduce_prefix and structure.stage in (Stage.REDUCED, Stage.CONCLUDED):
            written = tags.reduce_prefix[tags.reduce_prefix.index(token) + 1 :]
            forced = list(takewhile(lambda each: each not in tags.roles, written))
        spelling = "\n" + tokenizer.decode(forced[len(tags.newline) :]).strip()
        if forced and rest[: len(forced)] != forced and after[number].startswith(spelling):
            rest = forced + encode_inside(tokenizer, after[number][len(spelling) :])
        for each in (token, *rest):
            structure.feed(each)
        whole += [token, *rest]
    return whole


@dataclass(frozen=True)
class RowEncoder:
    """Turns records into token ids and labels.

    Args:
        tokenizer: a transformers tokenizer with the tags and a chat template.
        tags: the control tags.
        max_length: most tokens of a row, None for no limit.
        cut: cut a longer row at the last token after which no block is open, instead of dropping it.
        suffix: end prompts with the sentence of record of their form.
    """

    tokenizer: Any
    tags: TagSet
    max_length: int | None = None
    cut: bool = False
    suffix: bool = True

    def prompt(self, record: Record, form: Form) -> list[Mapping[str, str]]:
        """Return a record's chat. The user's last message ends with the sentence of the form."""
        messages = list(record.messages)
        users = [index for index, message in enumerate(messages) if message["role"] == "user"]
        if self.suffix and users:
            suffix = Suffix.SEQUENTIAL if form is Form.SEQUENTIAL else Suffix.PARALLEL
            last = messages[users[-1]]
            messages[users[-1]] = {**last, "content": suffix.exchange(last["content"])}
        return messages

    def encode(self, record: Record, form: Form) -> dict[str, Any]:
        """Tokenize a record: its prompt in the chat template, its document, the end token.

        Returns:
            ``input_ids``, ``labels`` (:data:`IGNORE` for ignored tokens) and ``kinds`` (:class:`TokenKind`), lists of
            one length; ``full_length``, the tokens before a cut; and ``plain``, whether the row is laid out as plain
            causal text.

        Raises:
            RowError: if it is too long, contains an end token, or the chat template fails on the prompt.
        """
        try:
            prompt = encode_prompt(self.tokenizer, self.prompt(record, form), self.tags.names)
        except Exception as err:  # a chat template is the model's own program and may raise anything
            raise RowError(Reason.TEMPLATE, " ".join(str(err).split())) from err
        text = record.document.sequential() if form is Form.SEQUENTIAL else record.document.render()
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if form is not Form.SEQUENTIAL:
            ids = with_forced_starts(ids, text, self.tokenizer, self.tags)
        end = self.tokenizer.eos_token_id
        while ids and ids[-1] == end:
            ids.pop()
        if end in ids:
            raise RowError(Reason.MALFORMED, f"the end token {self.tokenizer.eos_token} inside the document")
        kinds, is_open = token_kinds(ids, self.tags)
        labels = ids if form is Form.PLAIN else document_labels(ids, self.tags)
        ids, kinds = [*ids, end], [*kinds, TokenKind.ANSWER]
        labels, is_open = [*labels, end], [*is_open, False]
        length = len(prompt) + len(ids)
        if self.max_length is not None and length > self.max_length:
            room = self.max_length - len(prompt)
            keep = next((end for end in range(room, 0, -1) if not is_open[end - 1]), 0) if self.cut else 0
            if all(label == IGNORE for label in labels[:keep]):
                advice = "nothing outside a block fits" if self.cut else "raise max_length, or have it cut"
                raise RowError(Reason.TOO_LONG, f"{length} tokens, max_length is {self.max_length}; {advice}")
            ids, kinds, labels = ids[:keep], kinds[:keep], labels[:keep]
        return {
            "full_length": length,
            "input_ids": prompt + ids,
            "labels": [IGNORE] * len(prompt) + labels,
            "kinds": [TokenKind.PROMPT] * len(prompt) + kinds,
            "plain": form is Form.PLAIN,
        }
