"""Programs that hold a model and ask it, as their users call them: pipelines, langchain and smolagents."""

import pytest
from transformers import pipeline

from multiverse_hf import encode_prompt

LONG = "A=5+6; B=7+8; total? Think step by step and in parallel before answering."
SHORT = "A=5+6; total? Think step by step and in parallel before answering."


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def answers(model, tokenizer) -> dict[str, str]:
    """What ``generate`` of the same model says, prompt by prompt."""
    found = {}
    for prompt in (LONG, SHORT):
        ids = encode_prompt(tokenizer, prompt, return_tensors="pt")
        found[prompt] = tokenizer.decode(model.generate(ids, max_new_tokens=300)[0, ids.shape[1] :], True)
    assert "<Path>\n2: " in found[LONG]
    assert "Answer: 26" in found[LONG]
    assert "<Path>" not in found[SHORT]
    return found


def test_a_pipeline_answers_conversations_of_unequal_length_in_a_batch(model, tokenizer, answers):
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = pipe([chat(LONG), chat(SHORT)], batch_size=2, max_new_tokens=300, do_sample=False)
    assert [each[0]["generated_text"][-1]["content"] for each in said] == [answers[LONG], answers[SHORT]]


def test_a_pipeline_completes_text_as_that_of_the_base_class(model, plain, tokenizer):
    texts, options = (
        ["A=5+6; total", "B=7+8; C=1+1; total"],
        {"max_new_tokens": 12, "batch_size": 2, "do_sample": False},
    )
    ours, theirs = (pipeline("text-generation", model=each, tokenizer=tokenizer) for each in (model, plain))
    assert ours(texts, structure="off", **options) == theirs(texts, **options)


@pytest.mark.slow
def test_langchain_answers_batches_and_streams(model, tokenizer, answers):
    langchain = pytest.importorskip("langchain_huggingface")
    options = {"max_new_tokens": 300, "do_sample": False, "return_full_text": False}
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, **options)
    llm = langchain.HuggingFacePipeline(pipeline=pipe)
    asked = langchain.ChatHuggingFace(llm=llm)
    assert asked.invoke(LONG).content == answers[LONG]
    assert [each.content for each in asked.batch([SHORT, LONG])] == [answers[SHORT], answers[LONG]]
    pieces = [each.content for each in asked.stream(LONG)]
    assert "".join(pieces) == answers[LONG]
    assert len([piece for piece in pieces if piece]) > 20

    prompt = tokenizer.apply_chat_template(chat(LONG), tokenize=False, add_generation_prompt=True)
    assert "".join(llm.stream(prompt, stop=["Answer"])) == answers[LONG].partition("Answer")[0] + "Answer"
    whole = "".join(llm.stream(prompt, stop=["ends at 11"]))
    assert "ends at 15" in whole, "the other path is not ended by a stop in this one"


@pytest.mark.slow
def test_smolagents_answers_streams_and_stops(folder, answers):
    smolagents = pytest.importorskip("smolagents")
    model = smolagents.TransformersModel(
        model_id=str(folder), trust_remote_code=True, max_new_tokens=300, do_sample=False, device_map="cpu"
    )
    asked = [{"role": "user", "content": [{"type": "text", "text": LONG}]}]
    reply = model.generate(asked)
    assert reply.content == answers[LONG]
    assert reply.token_usage.output_tokens > 100
    assert "".join(each.content or "" for each in model.generate_stream(asked)) == answers[LONG]
    # It cuts the text at the first stop string, wherever that is.
    assert model.generate(asked, stop_sequences=["Answer"]).content == answers[LONG].partition("Answer")[0]
    assert model.generate(asked, stop_sequences=["is left"]).content == answers[LONG].partition("is left")[0]
