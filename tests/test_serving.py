"""The endpoint over a real socket: OpenAI's client, the same answers, and what is refused."""

import asyncio
import functools
import json
import os
import re
import signal
import socket
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

import httpx2  # noqa: E402 - comes with openai
from endpoint import Served, served_process, serving  # noqa: E402
from helpers import slow_unless  # noqa: E402
from openai.types import completion_create_params, responses  # noqa: E402
from openai.types.chat import completion_create_params as chat_create_params  # noqa: E402

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt  # noqa: E402
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX  # noqa: E402
from multiverse_hf.modeling.tags import encode_text  # noqa: E402
from multiverse_hf.serving.client import BranchClient, TextPiece  # noqa: E402
from multiverse_hf.serving.events import EVENTS_VERSION, StreamEvent, StreamEvents  # noqa: E402
from multiverse_hf.serving.protocol import ChatRequest, CompletionRequest, ResponsesRequest  # noqa: E402

NAME = "multiverse-tiny"
SUM = f"A=19-7+12; B=8+15-3; total? {PARALLEL_SUFFIX}"
SHORT = f"A=5+6; B=7+8; total? {PARALLEL_SUFFIX}"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as it:
        yield it


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


@functools.cache
def loaded() -> tuple[Any, Any]:
    path = embedded_model()
    return MultiverseForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def generated(prompt: str, **options: Any) -> list[int]:
    """The ids of the model's own ``generate``, end token included."""
    model, words = loaded()
    ids = encode_prompt(words, prompt, return_tensors="pt")
    output = model.generate(ids, return_dict_in_generate=True, **options)
    return output.sequences[0, ids.shape[1] : ids.shape[1] + output.stats[0].num_tokens].tolist()


def chat(client: Any, prompt: str = SHORT, **options: Any) -> Any:
    messages = options.pop("messages", [{"role": "user", "content": prompt}])
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def parts_of(message: Any) -> tuple[str, str]:
    """Reasoning and content of an answer."""
    return getattr(message, "reasoning_content", ""), message.content


def parts_in(ids: list[int]) -> tuple[str, str]:
    """Reasoning and content of ids, cut in the whole text."""
    text = loaded()[1].decode(ids, skip_special_tokens=True)
    if not text.lstrip().startswith("<Think>"):
        return "", text.lstrip("\n")
    reasoning, _, content = text.lstrip().removeprefix("<Think>").partition("</Think>")
    return reasoning.strip("\n"), content.lstrip("\n")


def document_of(message: Any) -> str:
    """The answer's document, from its two parts."""
    return "<Think>\n{}\n</Think>\n\n{}".format(*parts_of(message))


def test_an_answer_is_that_of_generate(client: Any) -> None:
    reply = chat(client, SUM)
    message, ids = reply.choices[0].message, generated(SUM)
    assert parts_of(message) == parts_in(ids)
    assert message.content == "Answer: 44"
    assert "<Path>" in message.reasoning_content
    assert message.reasoning == message.reasoning_content
    assert reply.choices[0].finish_reason == "stop"
    usage = reply.usage
    assert usage.completion_tokens == len(ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens_details.reasoning_tokens < len(ids)
    assert usage.multiverse["num_forks"] == 1
    assert usage.multiverse["length"] < len(ids)
    assert usage.multiverse["parallelism"] == pytest.approx(len(ids) / usage.multiverse["length"], abs=1e-3)


def test_a_stream_is_the_whole_answer(client: Any) -> None:
    whole = chat(client, SUM).choices[0].message
    chunks = list(chat(client, SUM, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.content
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == whole.reasoning_content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len(deltas) > 20


def test_usage_so_far_is_in_every_chunk_where_it_is_asked_for(client: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(chat(client, SHORT, stream=True, stream_options=options))
    texts = list(client.completions.create(model=NAME, prompt="A", max_tokens=9, stream=True, stream_options=options))
    for each in (chunks, texts):
        counts = [chunk.usage.completion_tokens for chunk in each]
        assert counts == sorted(counts)
        assert counts[-2] == counts[-1] > counts[0]
        assert each[-1].choices == []
        assert all(chunk.usage.total_tokens == each[0].usage.prompt_tokens + count
                   for chunk, count in zip(each, counts, strict=True))  # fmt: skip
    with pytest.raises(openai.BadRequestError, match="goes with include_usage"):
        chat(client, stream=True, stream_options={"continuous_usage_stats": True})


def test_reasoning_can_be_left_out(client: Any) -> None:
    reply = chat(client, extra_body={"include_reasoning": False})
    assert not hasattr(reply.choices[0].message, "reasoning_content")
    deltas = [c.choices[0].delta for c in chat(client, stream=True, extra_body={"include_reasoning": False})]
    assert not any(hasattr(delta, "reasoning_content") for delta in deltas)
    assert "".join(delta.content or "" for delta in deltas) == reply.choices[0].message.content


def test_branches_are_streamed_while_they_are_written(served: Served) -> None:
    client = BranchClient(f"{served.url}/v1")
    tokens, texts, parts, kinds = [], {}, [], []
    for each in client.stream(SUM, logprobs=True):
        if isinstance(each, TextPiece):
            parts.append(each)
            continue
        kinds.append((each.kind, each.branch))
        if each.kind == "token":
            tokens.append(each)
            texts[each.branch] = texts.get(each.branch, "") + each.text
            assert (each.logprob is None) == (not each.sampled)
    assert sorted(each.token for each in tokens) == sorted(generated(SUM))
    assert [kind for kind, _ in kinds].count("fork") == 1
    assert {("close", "1"), ("close", "2")} <= set(kinds)
    assert kinds[-1] == ("finish", "")
    assert [texts[branch].split()[1] for branch in ("1", "2")] == ["1:", "2:"]
    written = [each.branch for each in tokens if each.branch]
    assert written[written.index("2") :].count("1") > 5  # side by side, not one after the other
    assert "".join(part.text for part in parts if part.kind == "content") == "Answer: 44"


def test_the_page_names_every_field_of_the_events() -> None:
    page = (Path(__file__).parents[1] / "docs/serving.md").read_text()
    named = set(re.findall(r"`(\w+)`", page[page.index("## Stream branches") : page.index("## Keys")]))
    assert {*StreamEvent.model_fields, *StreamEvents.model_fields} - {"events"} <= named
    assert f"now {EVENTS_VERSION}." in page


def test_sampling_with_a_seed_is_that_of_generate(client: Any) -> None:
    options = {"temperature": 1.3, "top_p": 0.9, "seed": 7, "max_completion_tokens": 150}
    found = parts_of(chat(client, **options).choices[0].message)
    ids = generated(
        SHORT, do_sample=True, temperature=1.3, top_p=0.9, seed=7, max_new_tokens=150, max_total_tokens=150
    )
    assert found == parts_in(ids)


def test_several_answers_are_the_rows_of_generate(client: Any) -> None:
    model, words = loaded()
    reply = chat(client, n=3, temperature=2.0, seed=3, max_tokens=200)
    ids = encode_prompt(words, SHORT, return_tensors="pt")
    output = model.generate(
        ids, do_sample=True, temperature=2.0, seed=3, num_return_sequences=3, max_new_tokens=200, max_total_tokens=200
    )
    expected = [parts_in(row[ids.shape[1] :].tolist()) for row in output]
    assert [parts_of(choice.message) for choice in reply.choices] == expected
    assert len(set(expected)) > 1


def test_log_probabilities_are_the_models(client: Any) -> None:
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0]
    content = whole.logprobs.content
    assert "".join(each.token for each in content) == whole.message.content
    assert all(each.bytes == list(each.token.encode()) for each in content)
    assert all(len(each.top_logprobs) == 2 for each in content)
    assert all(each.top_logprobs[0].token == each.token for each in content)  # greedy
    assert all(each.logprob == each.top_logprobs[0].logprob <= 0 for each in content)
    streamed = [
        each
        for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for each in chunk.choices[0].logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]
    assert [each.logprob for each in streamed] == pytest.approx([each.logprob for each in content], abs=1e-5)


@pytest.mark.parametrize(
    "stop", slow_unless([["nowhere", "+15", "zzz"]], ["Follow chain B", ["nowhere", "+15", "zzz"], "Answer"])
)
def test_the_answer_ends_before_a_stop_string(client: Any, stop: Any) -> None:
    message = chat(client, SUM).choices[0].message
    whole = document_of(message)
    stops = [stop] if isinstance(stop, str) else stop
    reply = chat(client, SUM, stop=stop).choices[0]
    text = document_of(reply.message).removesuffix("\n</Think>\n\n" if stop != "Answer" else "")
    expected = whole[: min(at for each in stops if (at := whole.find(each)) >= 0)]
    assert text.rstrip("\n") == expected.rstrip("\n")
    assert (reply.finish_reason, reply.message.content) == ("stop", "")
    assert reply.multiverse["finish_reason"] == "cancelled"


@pytest.mark.parametrize(("limit", "name"), [(20, "max_tokens"), (30, "max_completion_tokens")])
def test_max_tokens_bounds_all_tokens(client: Any, limit: int, name: str) -> None:
    reply = chat(client, SUM, **{name: limit})
    assert reply.usage.completion_tokens <= limit
    assert reply.choices[0].finish_reason == "length"


def test_biases_and_penalties_change_the_answer(client: Any) -> None:
    _, words = loaded()
    banned = words.encode("A", add_special_tokens=False)[0]
    text = chat(client, logit_bias={str(banned): -100}, max_tokens=60).choices[0].message
    assert "A" not in (getattr(text, "reasoning_content", "") + text.content)
    unsure = {"prompt": "Hello", "max_tokens": 60, "temperature": 2.0, "seed": 1}
    plain = parts_of(chat(client, **unsure).choices[0].message)
    for options in (
        {"frequency_penalty": 2.0},
        {"presence_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 3.0}},
    ):
        assert parts_of(chat(client, **unsure, **options).choices[0].message) != plain


def test_text_completions_continue_the_text(client: Any) -> None:
    model, words = loaded()
    prompt = f"A=5+6; total? {PARALLEL_SUFFIX}"
    ids = encode_text(words, prompt)
    output = model.generate(torch.tensor([ids]), max_new_tokens=40, max_total_tokens=40)
    expected = words.decode(output[0, len(ids) :], skip_special_tokens=True)
    reply = client.completions.create(model=NAME, prompt=prompt, max_tokens=40, logprobs=1)
    assert reply.choices[0].text == expected
    logprobs = reply.choices[0].logprobs
    assert "".join(logprobs.tokens) == expected
    assert len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(logprobs.tokens)
    assert client.completions.create(model=NAME, prompt=ids, max_tokens=40).choices[0].text == expected
    named = client.completions.create(model=NAME, prompt=ids, extra_body={"max_completion_tokens": 40})
    assert named.choices[0].text == expected
    several = client.completions.create(model=NAME, prompt=[prompt, prompt], max_tokens=40)
    assert [choice.text for choice in several.choices] == [expected] * 2
    stream = client.completions.create(model=NAME, prompt=prompt, max_tokens=40, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_responses_have_reasoning_and_text(client: Any) -> None:
    message = chat(client, SUM).choices[0].message
    reply = client.responses.create(model=NAME, input=SUM, store=False)
    assert reply.output_text == message.content
    assert reply.output[0].content[0].text == message.reasoning_content
    assert reply.status == "completed"
    assert reply.usage.output_tokens > reply.usage.output_tokens_details.reasoning_tokens > 0
    events = list(client.responses.create(model=NAME, input=SUM, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == message.content
    reasoning = "".join(e.delta for e in events if e.type == "response.reasoning_text.delta")
    assert reasoning == message.reasoning_content
    last = events[-1].response
    assert (events[-1].type, last.output_text) == ("response.completed", message.content)
    assert client.responses.create(model=NAME, input=SUM, max_output_tokens=20).status == "incomplete"
    with client.responses.stream(model=NAME, input=SUM) as stream:
        assert stream.get_final_response().output_text == message.content


@pytest.mark.slow
def test_the_answer_after_the_reasoning_keeps_to_a_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"total": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["total"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}}
    message = chat(client, response_format=asked, max_tokens=400).choices[0].message
    assert message.reasoning_content == chat(client).choices[0].message.reasoning_content
    found = json.loads(message.content)
    assert list(found) == ["total"]
    assert isinstance(found["total"], int)
    form = {"type": "json_schema", "name": "sum", "schema": schema}
    again = client.responses.create(model=NAME, input=SHORT, text={"format": form}, max_output_tokens=400)
    assert json.loads(again.output_text) == found
    asked["json_schema"]["schema"] = {"type": "array", "uniqueItems": True}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        chat(client, response_format=asked)


def test_an_asynchronous_client_is_answered(served: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            replies = await asyncio.gather(
                *(chat(client, f"A={n}+6; B=1+1; total? {PARALLEL_SUFFIX}") for n in range(1, 4))
            )
        return [reply.choices[0].message.content for reply in replies]

    assert asyncio.run(ask()) == [f"Answer: {n + 8}" for n in range(1, 4)]


# What many do at once


@pytest.mark.slow
@pytest.mark.parametrize("clients", [24, pytest.param(64, marks=pytest.mark.long)])
def test_many_clients_get_their_own_answers_while_others_stop_and_leave(served: Served, clients: int) -> None:
    prompts = [f"A={n}+{n + 3}; B={n + 7}-{n % 5}; total? {PARALLEL_SUFFIX}" for n in range(1, clients + 1)]

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> Any:
                options: dict[str, Any] = {"seed": number, "temperature": 1.0} if number % 3 == 0 else {}
                if number % 8 == 5:  # leaves after a few chunks
                    stream = await chat(client, prompts[number], stream=True)
                    for _ in range(5):
                        await anext(stream.__aiter__())
                    await stream.close()
                    return None
                if number % 8 == 6:
                    with pytest.raises(openai.BadRequestError):
                        await chat(client, prompts[number], temperature=-1.0)
                    return None
                if number % 8 == 7:
                    await chat(client, prompts[number], stop="+")
                    return None
                return (await chat(client, prompts[number], max_tokens=400, **options)).choices[0].message

            return await asyncio.gather(*map(one, range(len(prompts))))

    messages = asyncio.run(ask())
    for number, message in enumerate(messages):
        if message is not None:
            options = {"do_sample": True, "seed": number, "temperature": 1.0} if number % 3 == 0 else {}
            ids = generated(prompts[number], max_new_tokens=400, max_total_tokens=400, **options)
            assert parts_of(message) == parts_in(ids)
    wait_until_idle(served)


@pytest.mark.slow
def test_a_preempted_answer_is_that_of_generate() -> None:
    prompts = [f"A={n}+{n + 3}; B={n + 7}-{n % 5}; total? {PARALLEL_SUFFIX}" for n in range(1, 9)]
    with serving(max_new_tokens=300, max_total_tokens=300, engine={"max_cache_tokens": 600}) as served:

        async def ask() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
                return await asyncio.gather(*(chat(client, each, max_tokens=200) for each in prompts))

        replies = asyncio.run(ask())
        assert served.worker.engine.memory()["num_preemptions"] > 0
    for prompt, reply in zip(prompts, replies, strict=True):
        assert parts_of(reply.choices[0].message) == parts_in(
            generated(prompt, max_new_tokens=200, max_total_tokens=200)
        )


def wait_until_idle(served: Served) -> None:
    """All slots are given back, and all memory."""
    until = time.monotonic() + 30
    while served.worker.num_active or served.worker.engine.memory()["used_tokens"]:
        assert time.monotonic() < until, served.worker.engine.memory()
        time.sleep(0.02)


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_ends_its_answer(served: Served, streams: bool) -> None:
    wait_until_idle(served)
    body = json.dumps(
        {
            "model": NAME,
            "messages": [{"role": "user", "content": SUM}],
            "stream": streams,
            "ignore_eos": True,
            "max_tokens": 2400,
        }
    )
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}"
        raw.sendall(f"{head}\r\n\r\n{body}".encode())
        until = time.monotonic() + 30
        while not served.worker.engine.memory()["num_branches"]:
            assert time.monotonic() < until
            time.sleep(0.01)
        steps = served.worker.engine.memory()["num_steps"]
    wait_until_idle(served)
    assert served.worker.engine.memory()["num_steps"] - steps < 1500


# What is refused


def post(served: Served, path: str, body: Any, **options: Any) -> Any:
    return httpx2.post(f"{served.url}{path}", json=body, timeout=60, **options)


MESSAGES = [{"role": "user", "content": "A=5+6; total?"}]


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"temprature": 1}, 400, "temprature", "did you mean temperature"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2; got 3"),
        ({"temperature": "1"}, 400, "temperature", "valid number; got '1'"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"n": 17}, 400, "n", "17 answers; this server allows at most 16"),
        ({"n": True}, 400, "n", "valid integer"),
        ({"max_tokens": 10**9}, 400, "max_tokens", "at most 65536"),
        ({"multiverse": {"max_new_tokens": 5000}}, 400, "multiverse.max_new_tokens", "at most 4096"),
        ({"multiverse": {"structure": "wild"}}, 400, "multiverse.structure", "'guided', 'lenient' or 'off'"),
        ({"multiverse": {"evnts": True}}, 400, "multiverse.evnts", "not a field"),
        ({"multiverse": {"events": True}}, 400, None, "goes with stream"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "calls no tools"),
        ({"store": True}, 400, "store", "stores nothing"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
        ({"top_logprobs": 2}, 400, None, "goes with logprobs"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias", "no token id"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "ids are from 0 to"),
        ({"stop": [""]}, 400, "stop", "at least 1 character"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "'user'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, None, ""),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages", "has a text"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "messages", "empty"),
        ({"messages": [{"role": "user", "content": "1 " * 4000}]}, 400, "messages", "context"),
        ({"model": "gpt-5"}, 404, "model", "multiverse-tiny"),
        ({"stream_options": {"include_usage": True}}, 400, None, "goes with stream"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, None, "differ"),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_with_the_field(
    served: Served, fields: dict[str, Any], status: int, param: str | None, words: str
) -> None:
    reply = post(served, "/v1/chat/completions", {"model": NAME, "messages": MESSAGES, **fields})
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert words in error["message"], error
    if param is not None:
        assert str(error["param"]).startswith(param), error
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("path", "params", "model"),
    [
        ("/v1/chat/completions", chat_create_params.CompletionCreateParamsBase, ChatRequest),
        ("/v1/completions", completion_create_params.CompletionCreateParamsBase, CompletionRequest),
        ("/v1/responses", responses.response_create_params.ResponseCreateParamsBase, ResponsesRequest),
    ],
)
def test_every_field_of_openais_client_is_known(path: str, params: Any, model: Any) -> None:
    known = {field.alias or name for name, field in model.model_fields.items()}
    assert set(typing.get_type_hints(params, include_extras=False)) - known == set(), path


def test_fields_that_ask_for_nothing_are_taken(client: Any) -> None:
    neutral = {"tools": [], "tool_choice": "auto", "store": False, "service_tier": "auto", "metadata": {}, "n": 1}
    reply = chat(client, extra_body={**neutral, "modalities": ["text"], "logit_bias": None})
    assert reply.choices[0].message.content == "Answer: 26"


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '"x"', "[" * 100_000, '{"model": "\\ud800"}'])
def test_a_body_that_is_no_request_is_refused(served: Served, body: str) -> None:
    reply = httpx2.post(
        f"{served.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_paths_and_methods_that_are_not_there(served: Served) -> None:
    assert (
        post(served, "/v1/embeddings", {}).json()["error"]["message"].startswith("there is no path '/v1/embeddings'")
    )
    assert httpx2.get(f"{served.url}/v1/completions").status_code == 405


def test_tags_and_special_tokens_in_a_message_are_text(client: Any, served: Served) -> None:
    spelled = "<Parallel><Goal><Outline>1: x</Outline></Goal><|im_end|></Think>"
    counted = post(served, "/tokenize", {"messages": [{"role": "user", "content": spelled}]}).json()
    _, words = loaded()
    assert spelled in words.decode(counted["tokens"])
    assert words.convert_tokens_to_ids("<Parallel>") not in counted["tokens"]
    assert chat(client, spelled, max_tokens=30).usage.prompt_tokens == counted["count"]
    for options in ({"user": spelled}, {"stop": spelled}):
        assert chat(client, **options).choices[0].message.content == "Answer: 26"


def test_an_answer_can_be_continued_and_sent_back(client: Any) -> None:
    first = chat(client).choices[0].message
    asked = {"role": "user", "content": SHORT}
    begun = {"role": "assistant", "content": "", "reasoning_content": first.reasoning_content}
    assert chat(client, messages=[asked, begun]).choices[0].message.content == first.content
    again = chat(client, messages=[asked, first.model_dump(exclude_unset=True), asked], max_tokens=50)
    assert again.usage.prompt_tokens > 100


# Keys, bounds and state


def test_a_key_is_needed_where_there_is_one(tmp_path: Any) -> None:
    with serving(keys=("one", "two")) as served:
        for key, status in (("one", 200), ("two", 200), ("three", 401), (None, 401)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            assert httpx2.get(f"{served.url}/v1/models", headers=headers).status_code == status
        assert httpx2.get(f"{served.url}/v1/models", headers={"Authorization": "Basic one"}).status_code == 401
        for path in ("/health", "/ready", "/metrics", "/version"):
            assert httpx2.get(f"{served.url}{path}").status_code == 200
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="three").models.list()


def test_bounds_are_told_with_their_numbers() -> None:
    with serving(max_body=2000, max_queue=0, read_timeout=0.5, engine={"max_num_seqs": 2}) as served:
        reply = post(served, "/v1/chat/completions", {"model": NAME, "messages": MESSAGES, "user": "x" * 3000})
        assert (reply.status_code, "at most 2000" in reply.text) == (413, True)
        reply = post(served, "/v1/chat/completions", {"model": NAME, "messages": MESSAGES, "n": 3})
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "1")
        assert "takes 2 at once" in reply.text
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:  # begins a body and never ends it
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            raw.settimeout(20)
            assert b" 408 " in raw.recv(1000)


@pytest.mark.slow
def test_metrics_agree_with_what_was_asked(tmp_path: Any) -> None:
    with serving() as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
        replies = [chat(client, SUM, n=2), chat(client, SHORT)]
        text = httpx2.get(f"{served.url}/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        total = sum(reply.usage.completion_tokens for reply in replies)
        assert float(values["multiverse:generation_tokens_total"]) == total
        assert float(values['multiverse:request_success_total{finished_reason="stop"}']) == 3
        assert float(values["multiverse:forks_total"]) == 3
        assert float(values["multiverse:e2e_request_latency_seconds_count"]) == 3
        assert float(values["multiverse:time_to_first_token_seconds_count"]) == 3
        for name in ("requests_running", "requests_waiting", "branches_running"):
            assert float(values[f"multiverse:num_{name}"]) == 0
        assert float(values["multiverse:kv_cache_usage_perc"]) == 0
        assert float(values["multiverse:num_preemptions_total"]) == 0


@pytest.mark.long
def test_a_server_is_as_it_was_after_minutes_of_load() -> None:
    seconds, clients = float(os.environ.get("SOAK_S", "600")), 16
    counted = {"stop": 0, "length": 0, "cancelled": 0, "tokens": 0}
    sizes: list[int] = []
    with served_process("--dtype", "float32", "--threads", "1") as (process, url):

        async def work(client: Any, number: int) -> None:
            turn = 0
            while time.monotonic() < until:
                turn += 1
                prompt = f"A={number + 2}+{turn % 17}; B={turn % 9}+8; total? {PARALLEL_SUFFIX}"
                stream = await chat(
                    client, prompt, stream=True, max_tokens=300, stream_options={"include_usage": True}
                )
                if (turn + number) % 10 == 0:  # goes away after a few chunks
                    for _ in range(5):
                        await anext(stream.__aiter__())
                    await stream.close()
                    counted["cancelled"] += 1
                    continue
                async for chunk in stream:
                    if chunk.usage is not None:
                        counted["tokens"] += chunk.usage.completion_tokens
                    elif chunk.choices[0].finish_reason is not None:
                        counted[chunk.choices[0].finish_reason] += 1

        async def watch() -> None:
            while time.monotonic() < until:
                await asyncio.sleep(seconds / 20)
                sizes.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * 4096)

        async def run() -> None:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
                await asyncio.gather(watch(), *(work(client, number) for number in range(clients)))

        until = time.monotonic() + seconds
        asyncio.run(run())
        time.sleep(2)
        text = httpx2.get(f"{url}/metrics").text
        values = {n: float(v) for n, v in (x.rsplit(" ", 1) for x in text.splitlines() if x[0] != "#")}
    print(counted, [size >> 20 for size in sizes])
    for name in ("num_requests_running", "num_requests_waiting", "num_answers_active", "kv_cache_usage_perc"):
        assert values[f"multiverse:{name}"] == 0, name
    ended = [
        values.get(f'multiverse:request_success_total{{finished_reason="{each}"}}', 0) for each in ("stop", "length")
    ]
    # an answer may end before the server hears that its client went away
    late = sum(ended) - counted["stop"] - counted["length"]
    assert 0 <= late == counted["cancelled"] - values["multiverse:request_cancelled_total"]
    assert values["multiverse:generation_tokens_total"] >= counted["tokens"]
    assert max(sizes[len(sizes) // 2 :]) < 1.1 * max(sizes[: len(sizes) // 2])


def test_each_request_is_logged_with_its_user_and_no_key() -> None:
    lines: list[str] = []
    with serving(keys=("secret",), log=lines.append) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="secret", max_retries=0)
        chat(client, user="me\n2", max_tokens=5)
        httpx2.get(f"{served.url}/v1/models", headers={"Authorization": "Bearer wrong"})
    assert [line.rsplit(" s", 1)[1] for line in lines] == [" user='me\\n2'", ""]
    assert [line.split()[:3] for line in lines] == [
        ["POST", "'/v1/chat/completions'", "200"],
        ["GET", "'/v1/models'", "401"],
    ]
    assert "secret" not in "".join(lines)


@pytest.mark.slow
def test_the_command_serves_and_ends_running_answers_at_a_signal() -> None:
    with served_process("--dtype", "float32") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        assert client.models.list().data[0].id == NAME
        stream = iter(chat(client, SUM, stream=True))
        begun = [next(stream) for _ in range(3)]
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in begun + rest)
        assert text == "Answer: 44"
        assert process.wait(30) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "after"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 1.0)])
def test_a_signal_while_the_model_is_loaded_ends_the_server_quietly(number: signal.Signals, after: float) -> None:
    with served_process(wait=False) as (process, _):
        time.sleep(after)
        process.send_signal(number)
        assert process.wait(60) == 0
        *before, last = process.stderr.read().splitlines()
        assert last == "stopped"
        assert all(line.startswith("ready") for line in before)  # it was loaded by then


@pytest.mark.slow
def test_a_server_that_is_being_stopped_takes_no_requests(served: Served, client: Any) -> None:
    served.worker.is_draining = True
    try:
        assert httpx2.get(f"{served.url}/ready").status_code == 503
        assert httpx2.get(f"{served.url}/health").status_code == 200
        with pytest.raises(openai.InternalServerError, match="being stopped"):
            chat(client)
    finally:
        served.worker.is_draining = False
    assert httpx2.get(f"{served.url}/ready").json() == {"status": "ready", "model": NAME}
