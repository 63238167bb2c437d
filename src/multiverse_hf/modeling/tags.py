"""The control tags of a tokenizer: their token ids, and prompts in which a user's own text cannot spell them.

Everything that knows how a tag is spelled goes through this module. What the tags mean is the family's
(:mod:`~.families`). Imports no torch.
"""

import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from .families import FAMILIES, MULTIVERSE, NPR, ROLES, Family, find_family, pieces_of, read_family  # noqa: F401

TagNames = Family  # its name while a family was its tags alone
PRESETS = FAMILIES

# A label as it opens an outline: "1:", "2.1:".
LABEL = re.compile(r"\s*(\d+(?:\.\d+)*):")


@dataclass(frozen=True)
class TagSet:
    """The control tags of one tokenizer, as token ids. Stored in ``config.multiverse`` of a checkpoint.

    Args:
        names: the family: how the tags are spelled, and what they mean.
        ids: token id of every tag, keyed ``"<Goal>"``, ``"</Goal>"`` and so on.
        newline: ids of one newline.
        colon: ids of ``:``.
        digits: ids of ``0`` to ``9`` and of ``.``, keyed by that text; labels are spelled with them.
        label_pieces: text of every token that can stand in a label, keyed by id: digits, ``.``, ``:`` and white space.
        turns: how the chat template writes turns that are not the assistant's: the ids that open one, and the token
            that ends it. Tags in them are text. Empty where there is no chat template.
    """

    names: Family
    ids: dict[str, int]
    newline: list[int]
    colon: list[int]
    digits: dict[str, list[int]]
    label_pieces: dict[int, str] = field(repr=False)
    turns: tuple[tuple[tuple[int, ...], int], ...] = ()
    roles: dict[int, tuple[str, bool]] = field(init=False, repr=False, compare=False)  # id -> (role, is an open tag)
    trigger: int = field(init=False, repr=False, compare=False)  # the tag that opens the paths of a block
    ending: list[int] = field(init=False, repr=False, compare=False)  # the tags after the paths of a block, in order
    reduce_prefix: list[int] = field(init=False, repr=False, compare=False)  # what the engine writes before them

    def __post_init__(self) -> None:
        missing = [tag for tag in self.names.tokens if tag not in self.ids]
        if missing:
            raise ValueError(f"no token id for {', '.join(missing)}; build the tag set with TagSet.from_tokenizer")
        roles = {}
        for role, _ in self.names.items():
            roles[self.ids[self.names.open(role)]] = (role, True)
            roles[self.ids[self.names.close(role)]] = (role, False)
        object.__setattr__(self, "roles", roles)
        object.__setattr__(self, "trigger", self.ids[self.names.trigger])
        object.__setattr__(self, "ending", [self.ids[self.names.tag(tag)] for tag in self.names.ending])
        object.__setattr__(self, "reduce_prefix", self._spell(pieces_of(self.names.reduce_start)))

    def _spell(self, pieces: Sequence[str]) -> list[int]:
        """Return the ids of pieces of the text that the engine writes."""
        return [i for p in pieces for i in (self.newline if p == "\n" else [self.ids[self.names.tag(p)]])]

    def open(self, role: str) -> int | None:
        """Return the token id of a role's open tag, None where the family has no such tag."""
        return self.ids.get(self.names.open(role))

    def close(self, role: str) -> int | None:
        """Return the token id of a role's close tag, None where the family has no such tag."""
        return self.ids.get(self.names.close(role))

    @property
    def control_ids(self) -> list[int]:
        """Token ids of all tags, in :data:`ROLES` order, open before close."""
        return [self.ids[tag] for tag in self.names.tokens]

    def ordinal(self, number: int) -> list[int]:
        """Spell ``number`` and a colon, e.g. ``12:``."""
        return [i for digit in str(number) for i in self.digits[digit]] + self.colon

    def label(self, outline: Sequence[int], ordinal: int) -> list[int]:
        """Return the label a path is started with: its outline's own, else its ordinal.

        Args:
            outline: token ids between ``<Outline>`` and ``</Outline>``.
            ordinal: 1 for the first outline of a block.

        Returns:
            Token ids of e.g. ``1:`` or ``2.1:``, taken from the outline as they stand there.
        """
        label: list[int] = []
        for token in outline:
            piece = self.label_pieces.get(token)
            if piece is None:
                break
            if piece == ":":
                text = "".join(self.label_pieces[i] for i in label)
                if re.fullmatch(r"\d+(\.\d+)*", text):
                    return [*label, *self.colon]
                break
            if piece.strip():
                label.append(token)
            elif label:
                break
        return self.ordinal(ordinal)

    def path_prefix(self, label: Sequence[int]) -> list[int]:
        """Return the forced start of a path, e.g. ``\\n<Path>\\n1:``."""
        pieces = pieces_of(self.names.path_start)
        head = list(takewhile(lambda piece: piece != "{label}", pieces))
        tail = pieces[len(head) + 1 :]
        return [*self._spell(head), *(label if len(head) < len(pieces) else ()), *self._spell(tail)]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, names: Family | str | None = None) -> "TagSet":
        """Read the tags of a tokenizer that has them.

        Args:
            tokenizer: a transformers tokenizer.
            names: the family, its name, or None to take the first known one whose tags are all there.

        Raises:
            ValueError: if a tag is not one token of this tokenizer.
        """
        vocab = tokenizer.get_vocab()
        names = find_family(vocab) if names is None else read_family(names)
        missing = [tag for tag in names.tokens if tag not in vocab]
        if missing:
            others = f" and {len(missing) - 1} other tags" if len(missing) > 1 else ""
            raise ValueError(
                f"the tokenizer has no token for {missing[0]}{others}; train the model with recipes/sft.py, which "
                "adds them, or add them with TagSet.add_to(tokenizer) and resize the embeddings, or pass the "
                "names its tags have"
            )

        def encode(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        # Encoded between two tags, as they stand in a document; alone some tokenizers would put a space before them.
        tag = vocab[names.open("path")]

        def encode_after_tag(text: str) -> list[int]:
            ids = encode(names.open("path") + text)
            return ids[ids.index(tag) + 1 :]

        pieces: dict[int, str] = {}
        for token, token_id in vocab.items():
            text = re.sub(r"[ĠĊĉĠ▁\s]+", " ", token)
            if re.fullmatch(r" |:|\d{1,2}|\.", text):
                pieces[int(token_id)] = text
        newline = encode_after_tag("\n" + names.open("path"))[:-1]
        colon = encode_after_tag("1:")[len(encode_after_tag("1")) :] or encode(":")
        for token_id in newline:
            pieces[token_id] = " "
        if len(colon) == 1:
            pieces[colon[0]] = ":"
        digits = {digit: encode_after_tag("\n" + digit)[len(newline) :] for digit in "0123456789."}
        ids = {tag: int(vocab[tag]) for tag in names.tokens}
        return cls(names, ids, newline, colon, digits, pieces, read_turns(tokenizer))

    @classmethod
    def add_to(cls, tokenizer: Any, names: Family = MULTIVERSE) -> "TagSet":
        """Add the tags a tokenizer lacks, as tokens that ``skip_special_tokens=True`` keeps, and read the set."""
        from transformers import AddedToken

        vocab = tokenizer.get_vocab()
        new = [AddedToken(tag, normalized=False, special=False) for tag in names.tokens if tag not in vocab]
        tokenizer.add_tokens(new)
        return cls.from_tokenizer(tokenizer, names)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that ``config.multiverse`` holds."""
        return {
            "names": {role: getattr(self.names, role) for role in ROLES},
            "family": self.names.rules(),
            "ids": dict(self.ids),
            "newline": list(self.newline),
            "colon": list(self.colon),
            "digits": {digit: list(ids) for digit, ids in self.digits.items()},
            "label_pieces": {str(i): piece for i, piece in sorted(self.label_pieces.items())},
            "turns": [[list(opening), end] for opening, end in self.turns],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "TagSet":
        """Read what :meth:`to_dict` gave.

        Raises:
            ValueError: if a field is missing.
        """
        try:
            return cls(
                Family.from_rules(data["names"], data.get("family")),
                {tag: int(i) for tag, i in data["ids"].items()},
                list(data["newline"]),
                list(data["colon"]),
                {digit: list(ids) for digit, ids in data["digits"].items()},
                {int(i): piece for i, piece in data["label_pieces"].items()},
                tuple((tuple(opening), end) for opening, end in data.get("turns", ())),
            )
        except (KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"config.multiverse is not a tag set ({err!r}); save the checkpoint again") from err


def read_turns(tokenizer: Any) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Return how a chat template writes the turns of the user and of the system, for :attr:`TagSet.turns`.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        For each the ids that open its turn, and the first special token after its text. Empty without a chat template,
        and where its turns are not told apart by special tokens.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ()
    mark, turns = "\ue000", []
    user = {"role": "user", "content": mark}
    for messages in ([user], [{"role": "system", "content": mark}, {"role": "user", "content": "x"}]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            bare = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except Exception:  # a template is a program of the model's; many take no system message
            continue
        head, found, tail = text.partition(mark)
        if not found:
            continue
        head, tail, assistant = (
            tokenizer.encode(part, add_special_tokens=False) for part in (head, tail, text.removeprefix(bare))
        )
        special = {
            *tokenizer.all_special_ids,
            *(i for i, each in tokenizer.added_tokens_decoder.items() if each.special),
        }
        # the turn begins with the token that begins the assistant's, else with the last special one
        marks = assistant[:1] if special.intersection(assistant[:1]) & set(head) else special
        begin = max((at for at, token in enumerate(head) if token in marks), default=None)
        end = next((token for token in tail if token in special), None)
        if begin is None or end is None:
            continue
        opening = head[begin:]
        while len(opening) > 1 and not tokenizer.decode(opening[-1:]).strip():  # may be one token with the text
            opening.pop()
        turns.append((tuple(opening), end))
    return tuple(dict.fromkeys(turns))


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Any],
    names: Family | None = None,
    add_generation_prompt: bool = True,
    return_tensors: str | None = None,
) -> Any:
    """Tokenize a user's prompt, or a batch of them, so that tags it spells stay text and can never fork.

    A string becomes one user message where the tokenizer has a chat template. Tags in an assistant's message are
    control tags (that is how a half-written answer is continued); in every other message they are text. So are the
    tokenizer's special tokens, such as the end of a turn. A family may have a system message of record, which a prompt
    without one begins with.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: the user's text, or chat messages; or a list of prompts, each one or the other.
        names: the family; by default the known one whose tags the tokenizer has.
        add_generation_prompt: end with the opening of the assistant's turn.
        return_tensors: of one prompt: None for a list of ids, ``"pt"`` for a tensor. A list of prompts always gives
            tensors.

    Returns:
        Of one prompt its token ids, as a list or as a tensor (1, L) int64; decoding them gives the prompt's text back.
        Of a list of B prompts a ``BatchEncoding`` for ``generate(**batch)``: ``input_ids`` (B, L) int64 padded on the
        left, and ``attention_mask`` (B, L) int64, 1 at tokens and 0 at padding.

    Raises:
        ValueError: if a prompt is empty.
        TypeError: if a prompt is neither text nor chat messages.
    """
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors is None or 'pt', got {return_tensors!r}")
    if not isinstance(prompt, str) and isinstance(prompt, Sequence) and not len(prompt):
        raise ValueError("the list of prompts is empty; give at least one")
    names = names or find_family(tokenizer.get_vocab())
    is_batch = isinstance(prompt, Sequence) and not isinstance(prompt, str) and len(prompt) > 0
    if not is_batch or isinstance(prompt[0], Mapping):
        ids = _encode(tokenizer, read_messages(prompt, "the prompt"), names, add_generation_prompt)
        if return_tensors is None:
            return ids
        import torch

        return torch.tensor([ids])

    from transformers import BatchEncoding

    rows = [
        _encode(tokenizer, read_messages(each, f"prompt {number}"), names, add_generation_prompt)
        for number, each in enumerate(prompt)
    ]
    width = max(map(len, rows))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    batch = {
        "input_ids": [[pad] * (width - len(ids)) + ids for ids in rows],
        "attention_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows],
    }
    return BatchEncoding(batch, tensor_type="pt")


def read_messages(prompt: Any, where: str) -> list[Mapping[str, str]]:
    """Read one prompt as chat messages.

    Args:
        prompt: text or chat messages.
        where: what to call it in an error.

    Raises:
        ValueError: if it is empty.
        TypeError: if it is neither text nor chat messages.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise TypeError(f"{where} must be text or a list of chat messages, got {reprlib.repr(prompt)}")
    for message in messages:
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise TypeError(f"{where}: a message's {key} must be text, got {reprlib.repr(message.get(key))}")
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"{where} is empty; give the problem to answer")
    return list(messages)


def encode_text(tokenizer: Any, text: str, names: Family | None = None) -> list[int]:
    """Return the ids of a text without a chat template. Tags and special tokens that it spells stay text."""
    return _join(tokenizer, *_guard(tokenizer, [text], names or find_family(tokenizer.get_vocab())), False)


def _guard(tokenizer: Any, texts: Sequence[str], names: Family) -> tuple[list[str], str]:
    """Return texts with a mark after the first character of each tag and special token, and the mark.

    Split at the mark and put together again without it, the token never forms. Any private character will do that the
    texts do not hold themselves.
    """
    contents = "".join(texts)
    mark = next(char for char in map(chr, range(0xE000, 0xF900)) if char not in contents)
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in [*added, *tokenizer.all_special_tokens] if getattr(token, "special", True)}
    acting = "|".join(re.escape(token) for token in sorted({*names.tokens, *special}) if len(token) > 1)
    begin = re.compile(f"(?={acting})(.)", re.DOTALL)
    return [begin.sub(rf"\1{mark}", text) for text in texts], mark


def _join(tokenizer: Any, texts: Sequence[str], mark: str, has_template: bool) -> list[int]:
    """Return the ids of texts that :func:`_guard` gave, one after the other on lines of their own."""
    first, *rest = "\n".join(texts).split(mark)
    if has_template:
        ids = tokenizer.encode(first, add_special_tokens=False)
    else:
        ids = tokenizer.encode(first)
        bare = tokenizer.encode(first, add_special_tokens=False)
        while ids[len(bare) :] and ids[-1] == tokenizer.eos_token_id and bare[-1:] != ids[-1:]:
            ids.pop()  # some tokenizers end every text with it, and an answer is to follow
    return [*ids, *(i for piece in rest for i in encode_inside(tokenizer, piece))]


def _encode(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], names: Family, add_generation_prompt: bool
) -> list[int]:
    if names.system_prompt is not None and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": names.system_prompt}, *messages]
    contents = [message["content"] for message in messages]
    guarded, mark = _guard(tokenizer, contents, names)
    safe = [
        {**message, "content": content if message["role"] == "assistant" else safe_content}
        for message, content, safe_content in zip(messages, contents, guarded, strict=True)
    ]
    if not getattr(tokenizer, "chat_template", None):
        return _join(tokenizer, [message["content"] for message in safe], mark, False)
    continues = safe[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        safe,
        tokenize=False,
        add_generation_prompt=add_generation_prompt and not continues,
        continue_final_message=continues,
    )
    return _join(tokenizer, [text], mark, True)


def encode_inside(tokenizer: Any, piece: str) -> list[int]:
    """Tokenize what stands in the middle of a text: after a newline, for at the very beginning some tokenizers put a
    space before it."""
    newline = tokenizer.encode("\n", add_special_tokens=False)
    ids = tokenizer.encode("\n" + piece, add_special_tokens=False)
    if ids[: len(newline)] == newline:
        return list(ids[len(newline) :])
    return list(tokenizer.encode(piece, add_special_tokens=False))
