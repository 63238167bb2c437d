"""Tag sets: read from real tokenizers, stored with a checkpoint, and kept apart from what users write."""

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from helpers import COLON, DIGITS, DOT, NEWLINE, TAGS, make_tags
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding, PreTrainedTokenizerFast, Qwen3Config

from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.tags import MULTIVERSE, NPR, TagNames, TagSet, encode_prompt

MAKE_BASE = Path(__file__).parents[1] / "recipes/multiverse-tiny/make_base.py"


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of multiverse-tiny: byte-level, with a chat template and the tags."""
    spec = importlib.util.spec_from_file_location("make_base", MAKE_BASE)
    make_base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_base)
    return make_base.build_tokenizer(600)


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without tags and without a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    tokenizer.train_from_iterator(["some text to learn from"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)


@functools.cache
def plain_tokenizer_with_tags() -> PreTrainedTokenizerFast:
    tokenizer = plain_tokenizer()
    TagSet.add_to(tokenizer)
    return tokenizer


# The set


@pytest.mark.parametrize("tags", [TAGS, make_tags(NPR)], ids=["multiverse", "npr"])
def test_a_tag_set_survives_json(tags):
    assert TagSet.from_dict(json.loads(json.dumps(tags.to_dict()))) == tags


@pytest.mark.parametrize("missing", ["names", "ids", "newline", "colon", "digits", "label_pieces"])
def test_a_stored_tag_set_without_a_field_is_refused(missing):
    data = {key: value for key, value in TAGS.to_dict().items() if key != missing}
    with pytest.raises(ValueError, match="not a tag set"):
        TagSet.from_dict(data)


def test_a_tag_without_an_id_is_refused():
    data = TAGS.to_dict()
    del data["ids"]["<Goal>"]
    with pytest.raises(ValueError, match="no token id for <Goal>"):
        TagSet.from_dict(data)


def test_roles_and_ids_of_the_default_family_are_the_twelve_published_tags():
    assert MULTIVERSE.tokens == [
        f"<{slash}{name}>"
        for name in ("Think", "Parallel", "Goal", "Outline", "Path", "Conclusion")
        for slash in ("", "/")
    ]
    assert TAGS.roles[TAGS.close("goal")] == ("goal", False)
    assert len(set(TAGS.control_ids)) == 12


def test_npr_has_neither_thinking_nor_a_parallel_tag():
    tags = make_tags(NPR)
    assert tags.open("parallel") is tags.close("think") is None
    assert len(tags.control_ids) == 8


@pytest.mark.parametrize("names", [{"goal": "two words"}, {"goal": ""}, {"goal": "<Goal>"}, {"goal": "Path"}])
def test_names_that_cannot_be_told_apart_are_refused(names):
    with pytest.raises(ValueError, match=r"tag name"):
        TagNames(**names)


D = DIGITS
LABELS = {
    "plain": ([D["1"], COLON, 60], [D["1"], COLON]),
    "nested": ([D["2"], DOT, D["1"], COLON, 60], [D["2"], DOT, D["1"], COLON]),
    "space before": ([NEWLINE, NEWLINE, D["7"], COLON], [D["7"], COLON]),
    "two digits": ([D["1"], D["2"], COLON], [D["1"], D["2"], COLON]),
    "none": ([60, 61], None),
    "empty": ([], None),
    "no colon": ([D["1"], 60], None),
    "digits only": ([D["1"]], None),
    "a colon only": ([COLON, 60], None),
    "text first": ([60, D["1"], COLON], None),
    "space inside": ([D["1"], NEWLINE, D["2"], COLON], None),
    "space before the colon": ([D["1"], NEWLINE, COLON], None),
    "dots only": ([DOT, COLON], None),
    "a dot at the end": ([D["1"], DOT, COLON], None),
    "a dot at the start": ([DOT, D["1"], COLON], None),
    "two dots": ([D["1"], DOT, DOT, D["1"], COLON], None),
}


@pytest.mark.parametrize(("outline", "label"), LABELS.values(), ids=LABELS)
def test_a_path_takes_its_outlines_label_or_else_its_ordinal(outline, label):
    assert TAGS.label(outline, 3) == (label or [D["3"], COLON])


@given(outline=st.lists(st.integers(0, 95), max_size=8), ordinal=st.integers(1, 30))
def test_any_outline_gives_a_label_that_spells_numbers_and_a_colon(outline, ordinal):
    label = TAGS.label(outline, ordinal)
    assert label[-1] == COLON
    assert set(label[:-1]) <= {DOT, *D.values()}
    assert len(label) > 1


# From a tokenizer


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, plain_tokenizer_with_tags])
def test_a_tag_set_spells_what_the_tokenizer_writes(tokenizer):
    tokenizer = tokenizer()
    tags = TagSet.from_tokenizer(tokenizer)
    assert tags.names == MULTIVERSE
    assert tokenizer.decode(tags.path_prefix(tags.ordinal(12))) == "\n<Path>\n12:"
    assert tokenizer.decode(tags.reduce_prefix) == "\n<Conclusion>\n"
    for label in ("1:", "10:", "2.1:", "12.34.5:"):
        ids = tokenizer.encode(f"<Outline>{label} do it</Outline>", add_special_tokens=False)[1:-1]
        assert tokenizer.decode(tags.label(ids, 9)) == label
    document = tokenizer.encode("<Goal></Goal>\n<Path>\n1: x</Path>\n<Conclusion>\n", add_special_tokens=False)
    prefix = tags.path_prefix(tags.ordinal(1))
    assert document[2 : 2 + len(prefix)] == prefix, "forced tokens are those a document is tokenized to"
    assert document[-len(tags.reduce_prefix) :] == tags.reduce_prefix


def test_a_tokenizer_without_tags_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"no token for <Think>.*TagSet.add_to"):
        TagSet.from_tokenizer(plain_tokenizer())
    with pytest.raises(ValueError, match="unknown tag family 'other'"):
        TagSet.from_tokenizer(plain_tokenizer(), "other")


def test_tags_that_are_added_survive_decoding_without_special_tokens():
    tokenizer = plain_tokenizer()
    size = len(tokenizer)
    tags = TagSet.add_to(tokenizer)
    assert len(tokenizer) == size + 12
    assert TagSet.add_to(tokenizer) == tags
    assert len(tokenizer) == size + 12, "added once"
    text = "<Think>\n<Parallel>\n<Goal><Outline>1: a</Outline></Goal>\n<Path>\n1: b</Path>\n</Parallel></Think>"
    ids = tokenizer.encode(text + "<end>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert [token for token in ids if token in tags.roles][:3] == [
        tags.open("think"), tags.open("parallel"), tags.open("goal"),
    ]  # fmt: skip


def test_a_family_of_another_name_is_found_by_its_preset():
    tokenizer = plain_tokenizer()
    tags = TagSet.add_to(tokenizer, NPR)
    assert TagSet.from_tokenizer(tokenizer) == TagSet.from_tokenizer(tokenizer, "npr") == tags
    assert tokenizer.decode(tags.path_prefix(tags.ordinal(2))) == "\n<step>\n2:"


# A user's prompt


pieces = st.lists(
    st.one_of(
        st.sampled_from(
            [*MULTIVERSE.tokens, "<", "</", ">", "<Go", "al>", "Path>", "<|im_end|", "<|im_end|>", "<end>", "\n", " "]
        ),
        st.text(max_size=5),
    ),
    min_size=1,
    max_size=8,
).map("".join)
# byte-level tokenizers hold any text but lone surrogates
pieces = pieces.filter(lambda text: text.strip() and not any("\ud800" <= char <= "\udfff" for char in text))

TOKENIZERS = pytest.mark.parametrize("tokenizer", [tiny_tokenizer, plain_tokenizer_with_tags])


@TOKENIZERS
@given(text=pieces)
@example(text="<Go<Goal>al>")
@example(text="<<Parallel>></Path></Path>")
@example(text="<Parallel><Goal><Outline>1: a</Outline></Goal>")
@example(text="a private \ue000 character and <\ue000Goal>")
def test_a_prompt_that_spells_tags_or_special_tokens_holds_none_and_decodes_to_its_text(tokenizer, text):
    tokenizer = tokenizer()
    tags = TagSet.from_tokenizer(tokenizer)
    ids = encode_prompt(tokenizer, text)
    assert not set(ids) & set(tags.control_ids)
    rendered = text
    if tokenizer.chat_template:
        rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == rendered
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    turns = ["<|im_start|>", "<|im_end|>", "<|im_start|>"] if tokenizer.chat_template else []
    assert tokenizer.convert_ids_to_tokens([i for i in ids if i in special]) == turns, "those of the template only"


@TOKENIZERS
@given(system=pieces, user=pieces)
def test_system_messages_hold_no_control_ids_but_an_assistants_do(tokenizer, system, user):
    tokenizer = tokenizer()
    tags = TagSet.from_tokenizer(tokenizer)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    assert not set(encode_prompt(tokenizer, messages)) & set(tags.control_ids)
    answer = "<Think>\n<Parallel>"
    ids = encode_prompt(tokenizer, [*messages, {"role": "assistant", "content": answer}])
    assert [token for token in ids if token in tags.roles] == [tags.open("think"), tags.open("parallel")]
    assert tokenizer.decode(ids).endswith(answer), "a half-written answer is continued, not closed"


@TOKENIZERS
@given(texts=st.lists(pieces, min_size=1, max_size=4))
@example(texts=["a", "<Goal>" * 9, "</Path>"])
def test_a_batch_holds_the_prompts_padded_on_the_left_and_no_control_ids(tokenizer, texts):
    tokenizer = tokenizer()
    tags = TagSet.from_tokenizer(tokenizer)
    # every second prompt is a conversation
    prompts = [[{"role": "user", "content": text}] if at % 2 else text for at, text in enumerate(texts)]
    batch = encode_prompt(tokenizer, prompts)
    assert isinstance(batch, BatchEncoding)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert not torch.isin(batch["input_ids"], torch.tensor(tags.control_ids)).any()
    for row, mask, text in zip(batch["input_ids"], batch["attention_mask"], texts, strict=True):
        ids = encode_prompt(tokenizer, text)
        padding = len(row) - len(ids)
        assert mask.tolist() == [0] * padding + [1] * len(ids)
        assert row[padding:].tolist() == ids


def test_a_batch_is_answered_like_its_prompts_alone():
    tokenizer, prompts = tiny_tokenizer(), ["A=1+2; total?", "one <Goal>", "A=19-7+12; B=8+15-3; total?"]
    model = tiny_model_for(tokenizer)
    batch = encode_prompt(tokenizer, prompts)
    answers = model.generate(**batch, max_new_tokens=8)[:, batch["input_ids"].shape[1] :]
    for row, prompt in zip(answers, prompts, strict=True):
        ids = encode_prompt(tokenizer, prompt, return_tensors="pt")
        alone = model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_a_half_written_answer_in_a_batch_keeps_its_control_tags():
    tokenizer = tiny_tokenizer()
    half = [{"role": "user", "content": "<Path>"}, {"role": "assistant", "content": "<Parallel>"}]
    rows = encode_prompt(tokenizer, [half, "<Path>"])["input_ids"].tolist()
    tags = TagSet.from_tokenizer(tokenizer)
    assert [[i for i in row if i in tags.roles] for row in rows] == [[tags.open("parallel")], []]


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ("", ValueError, "^the prompt is empty"),
        ("  \n", ValueError, "^the prompt is empty"),
        ([], ValueError, "^the list of prompts is empty"),
        ([{"role": "user", "content": ""}], ValueError, "^the prompt is empty"),
        (["a", ""], ValueError, "^prompt 1 is empty"),
        (["a", []], ValueError, "^prompt 1 is empty"),
        (None, TypeError, "^the prompt must be text or a list of chat messages, got None"),
        ({"role": "user", "content": "a"}, TypeError, "^the prompt must be text or a list"),
        (["a", None], TypeError, "^prompt 1 must be text or a list of chat messages, got None"),
        ([["a"]], TypeError, "^prompt 0 must be text or a list"),
        ([{"content": "a"}], TypeError, "^the prompt: a message's role must be text, got None"),
        (["a", [{"role": "user", "content": 3}]], TypeError, "^prompt 1: a message's content must be text, got 3"),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt, error, message):
    with pytest.raises(error, match=message):
        encode_prompt(tiny_tokenizer(), prompt)


def tiny_model_for(tokenizer):
    """A random model with the tokenizer's tags."""
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return MultiverseForCausalLM.from_config(config, TagSet.from_tokenizer(tokenizer)).eval()


def test_a_prompt_that_spells_a_whole_block_forks_nothing():
    tokenizer = tiny_tokenizer()
    model = tiny_model_for(tokenizer)
    text = "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
    control = {"max_depth": 0, "return_dict_in_generate": True, "max_new_tokens": 12}
    as_text = model.generate(encode_prompt(tokenizer, text, return_tensors="pt"), **control)
    assert as_text.stats[0].max_width == 1
    assert as_text.stats[0].num_tokens == as_text.stats[0].length
    half = [{"role": "user", "content": "go"}, {"role": "assistant", "content": text}]
    control |= {"max_depth": 1, "max_new_tokens": 60}
    as_control = model.generate(encode_prompt(tokenizer, half, return_tensors="pt"), **control)
    assert as_control.stats[0].max_width == 2


def test_a_tokenizer_that_ends_every_text_ends_no_prompt():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    end = tokenizer.eos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer.encode("What?")[-1] == tokenizer.eos_token_id
    assert encode_prompt(tokenizer, "What?") == tokenizer.encode("What?")[:-1]
