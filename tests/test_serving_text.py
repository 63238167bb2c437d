"""From tokens to text: document order, pieces of text, reasoning and content, stop strings."""

import asyncio
import functools
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
import torch
from helpers import EOS, TAGS, FollowPlan, Forced, tiny_model
from hypothesis import example, given
from hypothesis import strategies as st
from test_tags import plain_tokenizer_with_tags, tiny_tokenizer
from transformers import GenerationConfig, LogitsProcessorList

pytest.importorskip("openai")
pytest.importorskip("prometheus_client")

from openai.types.chat import ChatCompletionChunk

from multiverse_hf import MultiverseEngine
from multiverse_hf.modeling.tags import TagSet, encode_text
from multiverse_hf.serving.config import ServerConfig
from multiverse_hf.serving.penalties import CountPenalty
from multiverse_hf.serving.protocol import ChatRequest
from multiverse_hf.serving.replies import chat_chunks
from multiverse_hf.serving.text import CONTENT, REASONING, AnswerText, Delta, DocumentOrder, TokenDecoder
from multiverse_hf.serving.worker import ModelRequest, Update

PLANS = [
    (3, "eos"),
    (2, Forced(((3,), (5,), (1,))), 2, "eos"),
    (Forced(((2, Forced(((1,), (4,))), 1), (6,))), Forced(((1,), (1,))), 2, "eos"),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("limit", [8, 40, 200])
def test_tokens_come_in_document_order(plan: tuple, limit: int) -> None:
    model = tiny_model("qwen3")
    prompt, events = [50, 51, 52], []
    with MultiverseEngine(model) as engine:
        result = engine.submit(
            prompt,
            GenerationConfig(max_new_tokens=limit, eos_token_id=EOS),
            logits_processor=LogitsProcessorList([FollowPlan(plan, len(prompt))]),
            on_event=events.append,
        ).result(60)
    order, tokens = DocumentOrder(), []
    for event in events:
        order.feed(event)
        tokens += [each.token for each in order.settled()]
    assert tokens == result.ids


def test_tokens_are_told_as_soon_as_all_before_them_are_written() -> None:
    model, events = tiny_model("qwen3"), []
    with MultiverseEngine(model) as engine:
        engine.submit(
            [50, 51],
            GenerationConfig(max_new_tokens=100, eos_token_id=EOS),
            logits_processor=LogitsProcessorList([FollowPlan((Forced(((9,), (2,))), 2, "eos"), 2)]),
            on_event=events.append,
        ).result(60)
    order = DocumentOrder()
    for event in events:
        order.feed(event)
        told = [each.token for each in order.settled()]
        if event.kind == "token" and event.branch in ("", "1"):
            assert told == [event.token]
        elif event.kind == "token":
            assert told == []  # path 2 waits for path 1 in the document
    assert any(event.branch == "2" for event in events)


@functools.cache
def words(kind: str):
    return tiny_tokenizer() if kind == "tiny" else plain_tokenizer_with_tags()


@given(text=st.text(max_size=60), kind=st.sampled_from(["tiny", "plain"]))
@example(text="ßé漢字🙂 end", kind="plain")
@example(text="  two  spaces\n\n", kind="tiny")
def test_pieces_of_text_are_the_text(text: str, kind: str) -> None:
    tokenizer = words(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    decoder = TokenDecoder(tokenizer.decode)
    assert "".join([decoder.add(token) for token in ids] + [decoder.end()]) == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(4, 260), max_size=40))
def test_pieces_of_any_bytes_are_the_text_of_the_bytes(ids: list[int]) -> None:
    tokenizer = words("plain")
    decoder = TokenDecoder(tokenizer.decode)
    assert "".join([decoder.add(token) for token in ids] + [decoder.end()]) == tokenizer.decode(ids)


def split_slowly(text: str, stops: list[str]) -> tuple[str, str, bool]:
    """The oracle: reasoning and content of a whole text, and whether a stop string was found."""
    reasoning, content = "", text
    if text.lstrip().startswith("<Think>"):
        reasoning, _, content = text.lstrip().removeprefix("<Think>").partition("</Think>")
        reasoning, content = reasoning.strip("\n"), content.lstrip("\n")
    else:
        content = content.lstrip("\n")

    def cut(part: str) -> tuple[str, bool]:
        found = [at for stop in stops if (at := part.find(stop)) >= 0]
        return (part[: min(found)], True) if found else (part, False)

    reasoning, stopped = cut(reasoning)
    if stopped:
        return reasoning.rstrip("\n"), "", True
    content, stopped = cut(content)
    return reasoning, content, stopped


texts = st.text(alphabet="ab c\n<>é", max_size=20)


@given(
    before=st.sampled_from(["", "\n", " "]),
    reasoning=st.none() | texts,
    closes=st.booleans(),
    content=texts,
    stops=st.lists(st.sampled_from(["a", "ab", "b c", "\n\n", "cé", "ba"]), max_size=2),
)
@example("", "one ab", True, "ab two", ["b two"])
@example("", "a\n\n", True, "\n\nb", ["\n\n"])
def test_reasoning_content_and_stops_are_those_of_the_whole_text(
    before: str, reasoning: str | None, closes: bool, content: str, stops: list[str]
) -> None:
    tokenizer = words("tiny")
    tags = TagSet.from_tokenizer(tokenizer)
    if reasoning is None:
        text = content
    else:
        text = f"{before}<Think>{reasoning}" + (f"</Think>{content}" if closes else "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    if reasoning is None:
        ids = encode_text(tokenizer, text)
    answer = AnswerText(tokenizer.decode, tags, set(tokenizer.all_special_ids), stops)
    deltas = [delta for token in ids for delta in answer.add(token)] + answer.end()
    parts = {part: "".join(delta.text for delta in deltas if delta.part == part) for part in (REASONING, CONTENT)}
    expected = split_slowly(tokenizer.decode(ids), stops)
    found = (parts[REASONING], parts[CONTENT], answer.is_stopped)
    if "\n\n" in stops:  # line breaks at the reasoning's end are held back, and so are no stop string
        expected = split_slowly(tokenizer.decode(ids), [stop for stop in stops if stop != "\n\n"])
        assert found[2] or found == expected
        assert expected[0].startswith(found[0])
        return
    assert found == expected
    tokens = [token.token for delta in deltas if delta.part == CONTENT for token in delta.tokens]
    of_tokens = tokenizer.decode(tokens).lstrip("\n")
    assert of_tokens.startswith(parts[CONTENT])
    assert answer.is_stopped or of_tokens == parts[CONTENT]


def test_text_is_told_token_by_token_but_for_what_may_be_a_stop_string() -> None:
    tokenizer = words("tiny")
    tags = TagSet.from_tokenizer(tokenizer)
    answer = AnswerText(tokenizer.decode, tags, (), ["19!"])
    told = []
    for token in tokenizer.encode("1: 191919!9", add_special_tokens=False):
        told.append("".join(delta.text for delta in answer.add(token)))
    assert "".join(told) == "1: 1919"
    assert sum(map(bool, told)) > 3
    assert answer.is_stopped
    assert answer.end() == []


def test_the_reasoning_may_have_begun_in_the_prompt() -> None:
    tokenizer = words("tiny")
    tags = TagSet.from_tokenizer(tokenizer)
    answer = AnswerText(tokenizer.decode, tags, (), begins_inside=True)
    deltas = [d for token in tokenizer.encode("1: 2</Think>\n\n3") for d in answer.add(token)] + answer.end()
    assert "".join(d.text for d in deltas if d.part == REASONING) == "1: 2"
    assert "".join(d.text for d in deltas if d.part == CONTENT) == "3"


def test_penalties_are_openais() -> None:
    scores = torch.zeros(2, 6)
    ids = torch.tensor([[5, 5, 1, 1, 2], [5, 5, 0, 0, 0]])
    after = CountPenalty(2, 0.5, 0.25)(ids, scores)
    assert after.tolist() == [[0, -1.25, -0.75, 0, 0, 0], [-1.75, 0, 0, 0, 0, 0]]


def test_text_without_a_template_keeps_tags_as_text() -> None:
    tokenizer = words("tiny")
    tags = TagSet.from_tokenizer(tokenizer)
    ids = encode_text(tokenizer, "1 <Parallel> 2")
    assert not set(ids) & set(tags.control_ids)
    assert tokenizer.decode(ids) == "1 <Parallel> 2"
    assert TAGS.open("parallel") is not None


@given(st.text())
def test_a_chunk_around_a_text_is_what_openais_type_writes(text: str) -> None:
    worker = SimpleNamespace(config=ServerConfig("m"), decode=None)
    body = ChatRequest(model="m", messages=[{"role": "user", "content": "?"}], stream_options={}, stream=True)

    async def updates() -> AsyncIterator[Update]:
        yield Update(0, [Delta(REASONING, text), Delta(CONTENT, text)], [])

    async def lines() -> list[str]:
        return [line async for line in chat_chunks(worker, body, ModelRequest([[1]]), updates())]

    written = [line.removeprefix("data: ").removesuffix("\n\n") for line in asyncio.run(lines())[1:-1]]
    chunks = [ChatCompletionChunk.model_validate_json(line) for line in written]
    assert [chunk.model_dump_json(exclude_unset=True) for chunk in chunks] == written
    assert [chunk.choices[0].delta.model_dump(exclude_unset=True) for chunk in chunks] == [
        {"reasoning_content": text, "reasoning": text},
        {"content": text},
    ]
