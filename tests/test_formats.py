"""``response_format``: after its reasoning an answer keeps to a JSON schema, in branches and batches."""

import json
import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from helpers import slow_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from multiverse_hf import MultiverseForCausalLM, TagSet, embedded_model, encode_prompt
from multiverse_hf.modeling.tags import NPR
from multiverse_hf.serving import formats

pytest.importorskip("xgrammar")

from multiverse_hf.serving.formats import FormatCompiler, FormatProcessor
from multiverse_hf.serving.formats_worker import compile_schema
from multiverse_hf.serving.schemas import MAX_SCHEMA_DEPTH, read_schema

PROMPT = "A=19-7+12; B=8+15-3; total? Think step by step and in parallel before answering."
TOTAL = {
    "type": "object",
    "properties": {"total": {"type": "integer"}, "even": {"type": "boolean"}},
    "required": ["total", "even"],
    "additionalProperties": False,
}


def asked(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def model():
    return MultiverseForCausalLM.from_pretrained(embedded_model())


@pytest.fixture(scope="module")
def compiler(tokenizer, model) -> Iterator[FormatCompiler]:
    compiler = FormatCompiler(tokenizer, model.tags, model.config.vocab_size, model.generation_config.eos_token_id)
    yield compiler
    compiler.close()


class CallersOwn(FormatProcessor):
    """The same processor, but called as a caller's own is: with whole batches, and a copy for each branch."""

    is_stateless = False

    def __deepcopy__(self, memo: dict) -> "CallersOwn":
        return CallersOwn(self.grammar, self.reader, self.prompt_length)


# Answers


@pytest.mark.parametrize(
    "options",
    slow_unless(
        [{}], [{}, {"do_sample": True, "seed": 5, "structure": "lenient", "max_branches": 1}, {"structure": "off"}]
    ),
    ids=str,
)
def test_an_answer_branches_in_its_reasoning_and_then_keeps_to_the_schema(model, tokenizer, compiler, options):
    ids = encode_prompt(tokenizer, PROMPT, return_tensors="pt")
    processor = compiler.compile(asked(TOTAL), ids.shape[1])
    output = model.generate(
        ids, logits_processor=[processor], max_new_tokens=500, return_dict_in_generate=True, **options
    )
    assert output.stats[0].num_forks == (0 if options.get("structure") == "off" else 1)
    assert output.sequences[0, -1] == tokenizer.eos_token_id
    reasoning, found, text = tokenizer.decode(output.sequences[0, ids.shape[1] : -1]).partition("</Think>")
    assert found
    assert "Sum: A 24 B+20=44" in reasoning, "the reasoning is the model's own"
    value = json.loads(text)
    assert list(value) == ["total", "even"]
    assert type(value["total"]) is int
    assert type(value["even"]) is bool


@pytest.mark.slow
def test_it_gives_the_answer_that_it_gives_as_a_callers_own_and_with_drafts(model, tokenizer, compiler):
    ids = encode_prompt(tokenizer, PROMPT, return_tensors="pt")
    processor = compiler.compile(asked(TOTAL), ids.shape[1])
    own = CallersOwn(processor.grammar, processor.reader, ids.shape[1])
    options = {"max_new_tokens": 500, "do_sample": True, "seed": 3, "num_return_sequences": 2}
    answers = model.generate(ids, logits_processor=[processor], **options)
    assert torch.equal(answers, model.generate(ids, logits_processor=[own], **options))
    assert torch.equal(answers, model.generate(ids, logits_processor=[processor], speculate=3, **options))
    assert len({tuple(row) for row in answers.tolist()}) > 1, "samples of one prompt differ"


def test_answers_of_the_base_class_keep_to_it_in_a_batch(model, tokenizer, compiler):
    """Beams of ``structure="off"`` are written by transformers, in padded rows that go on after their end token."""
    batch = encode_prompt(tokenizer, ["A=5+6; total?", PROMPT], return_tensors="pt")
    tags = tokenizer.encode("<Think></Think>", add_special_tokens=False)
    ids = torch.cat([batch["input_ids"], torch.tensor([tags, tags])], dim=1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    processor = compiler.compile(asked({"enum": ["yes", "no", 1]}), ids.shape[1])
    options = {"structure": "off", "num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 40, "do_sample": False}
    output = model.generate(ids, attention_mask=mask, logits_processor=[processor], **options)
    texts = [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in output]
    assert len(texts) == 6
    assert all(json.loads(text) in ("yes", "no", 1) for text in texts), texts


def test_a_format_can_ask_for_any_object_or_for_nothing(model, tokenizer, compiler):
    assert compiler.compile({"type": "text"}, 3) is None
    ids = encode_prompt(tokenizer, PROMPT, return_tensors="pt")
    processor = compiler.compile({"type": "json_object"}, ids.shape[1])
    output = model.generate(ids, logits_processor=[processor], max_new_tokens=500)
    assert type(json.loads(tokenizer.decode(output[0, ids.shape[1] : -1]).partition("</Think>")[2])) is dict


# Properties


@st.composite
def schemas(draw, depth: int = 2):
    """Schemas of all kinds whose texts are short, so that a random model ends some of them."""
    kinds = ["enum", "integer", "number", "string", "boolean", "null", "pattern"]
    kind = draw(st.sampled_from(kinds + (["object", "array", "anyOf"] if depth else [])))
    inner = schemas(depth=depth - 1)
    if kind == "enum":
        return {"enum": draw(st.lists(st.sampled_from(['a"\\b', "é\n", 1, None, -2.5, True]), min_size=1, max_size=3))}
    if kind == "integer":
        low = draw(st.integers(-30, 30))
        return {"type": "integer", "minimum": low, "exclusiveMaximum": low + draw(st.integers(1, 40))}
    if kind == "string":
        low = draw(st.integers(0, 2))
        return {"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 3))}
    if kind == "pattern":
        return {"type": "string", "pattern": draw(st.sampled_from(["^[ -~]{2}$", "^(ab|[^x]?)$", r"^\d{2}\.\w$"]))}
    if kind == "array":
        low = draw(st.integers(0, 2))
        return {"type": "array", "items": draw(inner), "minItems": low, "maxItems": low + 1}
    if kind == "anyOf":
        return {"anyOf": draw(st.lists(inner, min_size=1, max_size=2))}
    if kind == "object":
        names = draw(st.lists(st.sampled_from(["a", 'b"', "ü c"]), unique=True, min_size=1))
        required = draw(st.lists(st.sampled_from(names), unique=True))
        return {"type": "object", "title": "x", "properties": {name: draw(inner) for name in names},
                "required": required}  # fmt: skip
    return {"type": kind}


def keeps(value, schema) -> bool:
    """Whether a value keeps to a schema of :func:`schemas`."""
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    if "anyOf" in schema:
        return any(keeps(value, each) for each in schema["anyOf"])
    kind = schema["type"]
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value < schema["exclusiveMaximum"]
    if kind == "number":
        return type(value) in (int, float)
    if kind == "string":
        if "pattern" in schema:
            allowed = {"^[ -~]{2}$": 2, "^(ab|[^x]?)$": (0, 1, 2), r"^\d{2}\.\w$": 4}[schema["pattern"]]
            return type(value) is str and len(value) in np.atleast_1d(allowed)
        return type(value) is str and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "array":
        is_list = type(value) is list and schema["minItems"] <= len(value) <= schema["maxItems"]
        return is_list and all(keeps(each, schema["items"]) for each in value)
    if kind == "object":
        is_object = type(value) is dict and set(schema["required"]) <= set(value) <= set(schema["properties"])
        return is_object and all(keeps(each, schema["properties"][name]) for name, each in value.items())
    return value is None if kind == "null" else type(value) is bool


@pytest.mark.slow
def test_whatever_a_random_model_ends_keeps_to_its_schema(tokenizer, compiler):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, eos_token_id=2, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    config.multiverse = TagSet.from_tokenizer(tokenizer).to_dict()
    model = MultiverseForCausalLM.adopt(LlamaForCausalLM(config).eval())
    ids = encode_prompt(tokenizer, "a", return_tensors="pt")
    ended = []

    @given(schemas(), st.integers(0, 99))
    @settings(max_examples=15)
    def check(schema, seed):
        processor = compiler.compile(asked(schema), ids.shape[1])
        rows = model.generate(
            ids, logits_processor=[processor], do_sample=True, seed=seed, num_return_sequences=2, max_new_tokens=60
        )
        for row in rows[:, ids.shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token == 2), None)
            text = tokenizer.decode(row[:end]).rpartition("</Think>")[2]
            if end is not None and "<Think>" not in text:
                ended.append(text)
                assert keeps(json.loads(text), schema), (schema, text)

    check()
    assert len(ended) > 10


def test_what_is_masked_follows_from_the_ids_alone(tokenizer, compiler):
    """A used processor masks as a new one: for rows that go on, go back, repeat or leave the format."""
    text = '</Think>\n{"total": -12, "even": true}'
    full = [3, 4, *tokenizer.encode("<Think>" + text + "<|im_end|>", add_special_tokens=False)]
    used = compiler.compile(asked(TOTAL), 2)
    rows = [full[:length] for length in range(2, len(full) + 1)]
    rows += [[*row, 40] for row in rows] + [[*row[:-1], 18] for row in rows[3:]]
    order = np.random.default_rng(0).permutation(3 * len(rows)) % len(rows)
    for at in order:
        ids, scores = torch.tensor([rows[at], rows[at]]), torch.zeros(2, 700, dtype=torch.float64)
        got = used(ids, scores)
        fresh = compiler.compile(asked(TOTAL), 2)(ids, scores)
        assert torch.equal(got, fresh)
        assert got.dtype == torch.float64
    assert not scores.any(), "the scores it is given are left as they are"
    assert len(used._matchers) <= formats.MAX_MATCHERS


# What may come next


def following(tokenizer, compiler, text: str, prompt: str = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"):
    """The tokens that may follow a prompt and a text."""
    prompt = tokenizer.encode(prompt, add_special_tokens=False)
    ids = torch.tensor([prompt + tokenizer.encode(text, add_special_tokens=False)])
    scores = compiler.compile(asked({"const": {"a": 1}}), len(prompt))(ids, torch.zeros(1, 684))
    return {tokenizer.decode([token]) for token in (scores[0] == 0).nonzero().flatten().tolist() if token < 680}


BLOCK = "<Parallel>\n<Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
ENDS = {"<|im_end|>"}
SPACE = {" ", "\n", "\t", "\r"}


def test_an_answer_begins_with_reasoning_or_with_the_text(tokenizer, compiler):
    assert following(tokenizer, compiler, "") == {"<Think>", "{"} | SPACE
    assert following(tokenizer, compiler, "{") == {'"'}
    assert following(tokenizer, compiler, " ") == {"{"} | SPACE
    assert following(tokenizer, compiler, '{"a":1}') == ENDS
    assert len(following(tokenizer, compiler, '{"a":1}<|im_end|>')) > 400, "it has ended"


def test_reasoning_is_not_masked_but_it_ends_no_answer(tokenizer, compiler):
    free = following(tokenizer, compiler, "<Think>")
    assert {"<Parallel>", "</Think>", "{"} <= free
    assert not ENDS & free
    whole = following(tokenizer, compiler, f"<Think>a{BLOCK}\n<Path>\n1: ")
    assert whole == free | ENDS, "a path ends by an end token, too"
    path_and_rest = f"{BLOCK}<Path>1: a</Path><Path>2: </Think></Path><Conclusion>c</Conclusion></Parallel>"
    assert following(tokenizer, compiler, f"<Think>{path_and_rest}") == free
    assert following(tokenizer, compiler, f"<Think>{path_and_rest}</Think>") == {"{"} | SPACE
    assert following(tokenizer, compiler, f"<Think>{path_and_rest}</Think>\n" + '{"a":1}') == ENDS


def test_reasoning_that_the_prompts_last_turn_begins_goes_on_in_the_answer(tokenizer, compiler):
    turn = "<|im_start|>user\nx<Think><|im_end|>\n<|im_start|>assistant\n"
    assert following(tokenizer, compiler, "", turn) == {"<Think>", "{"} | SPACE, "a tag of the user's is text"
    assert len(following(tokenizer, compiler, "", turn + "<Think>\n")) > 400
    assert following(tokenizer, compiler, "</Think>", turn + "<Think>\n") == {"{"} | SPACE
    assert following(tokenizer, compiler, "", turn + "<Think></Think>") == {"{"} | SPACE
    assert following(tokenizer, compiler, "", f"{turn}<Think>cut off<|im_end|>\n{turn}") == {"<Think>", "{"} | SPACE
    inside = turn + f"<Think>{BLOCK}\n<Path>1: a</Path>\n<Path>2: "
    assert following(tokenizer, compiler, "", inside) >= ENDS
    assert following(tokenizer, compiler, "</Path><Conclusion></Conclusion></Parallel></Think>", inside) == (
        {"{"} | SPACE
    )


def test_a_family_without_think_tags_writes_the_text_only():
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    tags = TagSet.add_to(tokenizer, NPR)
    own = FormatCompiler(tokenizer, tags, len(tokenizer), [0, 2])
    processor = own.compile({"type": "json_object"}, 1)
    (may,) = (processor(torch.tensor([[3]]), torch.zeros(1, len(tokenizer))) == 0).tolist()
    assert {tokenizer.decode([token]) for token, is_allowed in enumerate(may) if is_allowed} == {"{"} | SPACE
    ids = torch.tensor([[3, *tokenizer.encode("{}", add_special_tokens=False)]])
    (may,) = (processor(ids, torch.zeros(1, len(tokenizer))) == 0).nonzero(as_tuple=True)[1:]
    assert may.tolist() == [0, 2], "each end token"
    inside = "<guideline><plan>1: a</plan><plan>2: b</plan></guideline>\n<step>\n1: "
    ids = torch.tensor([tokenizer.encode(inside, add_special_tokens=False)])
    scores = own.compile({"type": "json_object"}, ids.shape[1])(ids, torch.zeros(1, len(tokenizer)))
    assert torch.equal(scores, torch.zeros_like(scores)), "a block that the prompt opened goes on"


# Schemas


@pytest.mark.parametrize(
    ("schema", "fits", "breaks"),
    [
        ({"type": "object"}, ["{}", '{"a": [1, "b"]}', "\n\n{}"], ["[]", "1", "{} "]),
        ({"properties": {"a": {}}, "required": ["a"]}, ['{"a": null}'], ["{}", '{"b": 1}', "3"]),
        (
            {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "string"}},
            ["{}", '{"a": null, "b": "x"}'],
            ['{"a": "x"}', '{"b": 1}'],
        ),
        ({"type": "object", "minProperties": 1, "maxProperties": 1}, ['{"a": 1}'], ["{}", '{"a": 1, "b": 2}']),
        ({"type": "object", "propertyNames": {"pattern": "^x*$"}}, ['{"xx": 1}'], ['{"a": 1}']),
        ({"type": "object", "patternProperties": {"^x$": {"type": "null"}}}, ['{"x": null}'], ['{"x": 1}']),
        ({"type": "array", "minItems": 1}, ['[1, "a"]'], ["[]"]),
        ({"prefixItems": [{"type": "null"}], "items": {"type": "string"}}, ['[null, "a"]'], ["[1]", "[null, 1]"]),
        ({"type": ["integer", "string"], "maxLength": 2, "minimum": 4}, ["4", '"ab"'], ["3", '"abc"', "null"]),
        ({"type": "integer", "multipleOf": 7}, ["14", "-7"], ["13"]),
        ({"type": "number", "minimum": -2.5, "exclusiveMaximum": 1}, ["-2.5", "0.5"], ["-2.6", "1", "1e5"]),
        ({"type": "string", "format": "date", "title": "x"}, ['"2020-02-03"'], ['"x"']),
        ({"type": "string", "format": "date", "maxLength": 3}, ['"abc"'], ['"2020-02-03"']),
        ({"type": "string", "format": "made-up"}, ['"x"'], ["1"]),
        ({"type": "string", "pattern": r"^(?:a|\d)+[^b]$"}, ['"a1c"'], ['"a1b"', '"a\\""', '"a"']),
        ({"type": "string", "pattern": r"^(\d{1,3}\.){3}\d{1,3}$"}, ['"127.0.0.1"'], ['"1.2.3"']),
        ({"type": "string", "minLength": 1, "maxLength": 200}, ['"ü"', f'"{"a" * 200}"'],
         ['""', '"\x15"', '"\t"', '"""', '"\\"']),
        ({"type": "string", "enum": ["a\nb", 'c"']}, ['"a\\nb"', '"c\\""'], ['"a\nb"', '"a"']),
        ({"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"},
         ['{"n": {"n": {}}}'], ['{"n": 1}']),
        ({"anyOf": [{"const": 1}, {"allOf": [{"type": "null"}]}], "default": None}, ["1", "null"], ["2"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_keyword_is_enforced(compiler, schema, fits, breaks):
    from xgrammar import GrammarMatcher

    grammar = compile_schema(compiler.vocabulary, read_schema(schema))

    def is_taken(text: str) -> bool:
        matcher = GrammarMatcher(grammar)
        return matcher.accept_string(text) and matcher.is_completed()

    assert [text for text in fits if not is_taken(text)] == []
    assert [text for text in breaks if is_taken(text)] == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {"type": "string"}}, r'schema.not = {"type": "string"}: it is not enforced without a type'),
        ({"minimum": 3}, "schema.minimum = 3: it is not enforced without a type"),
        ({"type": "array", "items": {"enum": [1]}, "uniqueItems": True}, "schema.uniqueItems = true"),
        ({"type": "object", "properties": {"a": {"type": "number", "multipleOf": 0.5}}},
         r"schema.properties.a.multipleOf = 0.5: it is not enforced beside type"),
        ({"type": "integer", "multipleOf": 7, "minimum": 3}, "multipleOf = 7: it is not .* beside minimum, type"),
        ({"type": "string", "pattern": "^a$", "maxLength": 3}, "maxLength = 3"),
        ({"$ref": "#/$defs/a", "maxLength": 3, "$defs": {"a": {}}}, r"maxLength = 3: it is not enforced beside \$ref"),
        ({"anyOf": [{"type": "null"}], "type": "string"}, "type = .string.: it is not enforced beside anyOf"),
        ({"allOf": [{}, {}]}, "only one schema in it is enforced"),
        ({"type": "string", "const": 1}, "const = 1: it is not of type"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "required = .b.: name it among"),
        ({"type": "object", "properties": {"a": {}}, "propertyNames": {}}, "propertyNames"),
        ({"if": {}, "then": {}}, "schema.if"),
        ({"$ref": "http://example.org/x"}, "a reference is # or begins with #/"),
        ({"type": "string", "pattern": "^(?=a)b$"}, "lookarounds"),
        ({"type": "string", "pattern": 'a"'}, "quotes"),
        ({"type": "string", "pattern": r"\n"}, "escapes of single characters"),
        ({"type": "string", "pattern": "a^b"}, "anchors stand at the ends"),
        ({"type": "string", "pattern": "^[ -ü]$"}, "ranges from ASCII"),
        ({"type": "string", "pattern": "(" * 3000}, "at most 2000 are compiled"),
        ({"type": "string", "pattern": "^(?:x|(a{1,50}){1,50}b)$"}, "groups in groups repeat 2500 times"),
        ({"type": "string", "pattern": "^(a*a?){1,300}$"}, "groups in groups repeat 3000 times"),
        ({"type": "string", "pattern": "^.{1,200}$"}, "is more than 128; state lengths by maxLength"),
        ({"type": "string", "maxLength": 10**9}, "an integer from 0 to 10000"),
        ({"type": "array", "items": [{}]}, "a schema is an object or a boolean"),
        ({"properties": []}, "an object of schemas"),
        ({"enum": ["x" * 200_000]}, "at most 100000 are compiled"),
        ({"const": math.nan}, "is not JSON"),
        ([], "must be an object"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_schema_that_is_not_enforced_is_refused_with_its_place_and_value(schema, message):
    with pytest.raises(ValueError, match=message):
        read_schema(schema)


def test_a_schema_that_is_too_deep_is_refused():
    schema = {}
    for _ in range(MAX_SCHEMA_DEPTH):
        schema = {"items": schema}
    with pytest.raises(ValueError, match=f"deeper than {MAX_SCHEMA_DEPTH} levels"):
        read_schema(schema)


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ({"type": "grammar"}, "response_format.type must be .* got 'grammar'"),
        ("json", "response_format.type must be"),
        ({"type": "json_schema"}, "response_format.json_schema.schema is missing"),
        (asked({"type": "strin"}), r'{"type": "strin"}: xgrammar cannot compile it \(Unsupported type "strin"\)'),
        (asked({"$ref": "#/$defs/x"}), "xgrammar cannot compile it"),
        (asked({"type": "string", "pattern": "(a"}), "The parenthesis is not closed"),
        (asked({"$ref": "#"}), "no text keeps to it"),
        (asked({"type": "integer", "minimum": 1, "maximum": 0}), "xgrammar cannot compile it"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_format_that_cannot_be_compiled_is_refused_with_the_reason(compiler, response_format, message):
    with pytest.raises(ValueError, match=message):
        compiler.compile(response_format, 1)


@pytest.mark.slow
def test_a_schema_that_takes_too_long_is_refused_and_the_next_one_is_served(tokenizer, model):
    compiler = FormatCompiler(tokenizer, model.tags, model.config.vocab_size, timeout_s=0.001)
    with pytest.raises(ValueError, match=r"takes more than 0.001 s to compile; remove minLength"):
        compiler.compile(asked({"type": "string", "pattern": "^(a{1,30}){1,30}$"}), 1)
    compiler._trial.timeout_s = 100
    assert compiler.compile(asked({"type": "null"}), 1) is not None
    compiler.close()


def test_threads_compile_at_once_and_the_cache_is_bounded(compiler, monkeypatch):
    monkeypatch.setattr(formats, "MAX_GRAMMARS", 3)
    made, errors = [], []

    def work(number: int) -> None:
        try:
            made.append(compiler.compile(asked({"const": number % 5}), 1))
        except Exception as err:
            errors.append(err)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(made) == 10
    assert len(compiler._grammars) == 3
    again = compiler.compile(asked({"const": 4}), 1)
    assert again.grammar is compiler.compile(asked({"const": 4}), 2).grammar


@pytest.mark.slow
def test_an_answer_without_an_end_token_is_refused(tokenizer, model):
    with pytest.raises(ValueError, match="set eos_token_id"):
        FormatCompiler(tokenizer, model.tags, model.config.vocab_size, [])
