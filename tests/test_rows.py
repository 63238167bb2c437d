"""Training rows: labels, collation, and a loss that agrees with the engine and with paths trained one by one."""

import functools

import pytest
import torch
from helpers import (
    COLON,
    DIGITS,
    EOS,
    FIRST_TEXT,
    NEWLINE,
    PAD,
    TAGS,
    Forced,
    answer,
    documents,
    slow_unless,
    tiny_config,
)
from helpers import tiny_model as new_tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_replay import DEEP, NESTED, PLANS, plans
from test_tags import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from multiverse_hf.data.chains import Kind, document, sample_problem
from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.records import Form, read_record
from multiverse_hf.data.rows import IGNORE, RowEncoder, document_labels, with_forced_starts
from multiverse_hf.modeling.labels import find_forced
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.tags import TagSet

PROMPT = [50, 51, 52]
OPEN, CLOSE = TAGS.open, TAGS.close
tiny_model = functools.cache(new_tiny_model)


def written(plan: tuple, **options) -> tuple:
    """An answer along a plan: the output, and the answer's ids without the prompt."""
    output = answer(tiny_model("qwen2"), [PROMPT], {tuple(PROMPT): plan}, **options)
    return output, documents(output, [PROMPT])[0][len(PROMPT) :]


def slow_labels(ids: list[int]) -> list[int]:
    """The definition, by the layout's segments: a segment's first token and its forced start are not learnt."""
    segments, labels = build_layout(ids, TAGS).segment_ids.tolist(), list(ids)
    for first in range(1, len(ids)):
        if segments[first] == segments[first - 1]:
            continue
        labels[first] = IGNORE
        if ids[first : first + 2] == [NEWLINE, OPEN("conclusion")]:
            end = first + 3
        elif ids[first : first + 2] == [NEWLINE, OPEN("path")]:
            end = ids.index(COLON, first) + 1
        else:
            continue
        labels[first:end] = [IGNORE] * (end - first)
    return labels


@settings(max_examples=8)
@given(plan=plans)
@example(plan=NESTED)
def test_labels_are_the_tokens_the_engine_sampled_and_nothing_else(plan):
    output, ids = written(tuple(item for item in plan if item != "eos"))
    sampled = output.sampled_mask[0, len(PROMPT) :][: len(ids)].tolist()
    labels = document_labels(ids, TAGS)
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if token != CLOSE("path") or sampled[at]:  # the engine writes it where the model ends a path with an end token
            assert label == (token if sampled[at] else IGNORE), f"token {at} of {ids}"
    assert labels == slow_labels(ids)


def test_labels_of_the_worked_example():
    outline = [OPEN("outline"), 60, CLOSE("outline")]
    head = [OPEN("parallel"), OPEN("goal"), *outline, *outline, CLOSE("goal")]
    path1 = [NEWLINE, OPEN("path"), NEWLINE, DIGITS["1"], COLON, 61, CLOSE("path")]
    path2 = [NEWLINE, OPEN("path"), NEWLINE, DIGITS["2"], COLON, CLOSE("path")]
    tail = [NEWLINE, OPEN("conclusion"), NEWLINE, 62, CLOSE("conclusion"), CLOSE("parallel"), EOS]
    assert document_labels([*head, *path1, *path2, *tail], TAGS) == [
        *head, *[IGNORE] * 5, *path1[5:], *[IGNORE] * 5, *path2[5:], *[IGNORE] * 3, *tail[3:],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [[61, CLOSE("path")], [NEWLINE, 61, CLOSE("path")], [NEWLINE, OPEN("path"), NEWLINE, DIGITS["9"], COLON]],
    ids=["no prefix", "a newline alone", "another label"],
)
def test_a_path_that_begins_otherwise_loses_only_what_agrees_with_the_forced_start(path):
    head = [OPEN("parallel"), OPEN("goal"), OPEN("outline"), 60, CLOSE("outline"), CLOSE("goal")]
    labels = document_labels([*head, *path], TAGS)[len(head) :]
    agreed = {2: 1, 3: 1, 5: 3}[len(path)]  # "\n<Path>\n" of "\n<Path>\n9:"; always the first token
    assert labels == [IGNORE] * agreed + path[agreed:]


def test_a_label_too_long_for_the_engine_is_forced_and_ignored_as_an_ordinal():
    one_dot = [DIGITS["1"], TAGS.digits["."][0]]
    label = [*one_dot * 5, DIGITS["1"], COLON]  # 1.1.1.1.1.1:
    head = [OPEN("parallel"), OPEN("goal"), OPEN("outline"), *label, CLOSE("outline"), CLOSE("goal")]
    output = answer(tiny_model("qwen2"), [head], max_new_tokens=120)
    ids = documents(output, [head])[0]
    labels = document_labels(ids, TAGS)
    start = len(head)
    assert ids[start : start + 5] == [NEWLINE, OPEN("path"), NEWLINE, DIGITS["1"], COLON]
    assert labels[start : start + 5] == [IGNORE] * 5


soup = st.lists(
    st.one_of(st.sampled_from(TAGS.control_ids), st.sampled_from([60, NEWLINE, COLON, DIGITS["1"], DIGITS["2"]])),
    max_size=50,
)


@given(ids=soup)
def test_any_ids_have_labels_that_are_the_ids_or_ignored(ids):
    labels = document_labels(ids, TAGS)
    segments = build_layout(ids, TAGS).segment_ids.tolist()
    assert len(labels) == len(ids)
    assert all(label in (token, IGNORE) for label, token in zip(labels, ids, strict=True))
    for at in range(1, len(ids)):
        if segments[at] != segments[at - 1]:
            assert labels[at] == IGNORE


@pytest.mark.parametrize("kind", list(Kind))
def test_the_rows_of_a_problem_hold_prompt_document_and_end(kind):
    import random

    tokenizer = tiny_tokenizer()
    tags, problem = TagSet.from_tokenizer(tokenizer), sample_problem(random.Random(3), kind)
    encoder = RowEncoder(tokenizer, tags)
    record = read_record({"prompt": str(problem), "document": document(problem)})
    row = encoder.encode(record, Form.PARALLEL)
    text = tokenizer.decode(row["input_ids"])
    assert text.endswith(document(problem) + tokenizer.eos_token)
    learnt = [label for label in row["labels"] if label != IGNORE]
    assert learnt[-1] == tokenizer.eos_token_id
    decoded = tokenizer.decode(learnt)
    assert decoded.startswith("<Think>")
    assert "<Path>" not in decoded
    assert "<Conclusion>" not in decoded
    assert decoded.count("</Path>") == text.count("</Path>")
    plain = encoder.encode(record, Form.PLAIN)
    assert plain["plain"]
    assert (
        tokenizer.decode([label for label in plain["labels"] if label != IGNORE]) == document(problem) + "<|im_end|>"
    )


def test_a_path_begins_with_the_ids_the_engine_writes_whatever_the_tokenizer_joins():
    """A byte-level BPE that, like those of Qwen2.5 and Llama 3, has a token for a colon and the line end after it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(":", "Ċ"), ("Ċ", "Ċ"), (":", "ĊĊ"), ("Ċ", "Ġ"), (".", "Ċ")]
    vocab = {token: number for number, token in enumerate([*letters, *("".join(merge) for merge in merges)])}
    bare = Tokenizer(models.BPE(vocab, merges))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bare.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|end|>")
    tags = TagSet.add_to(tokenizer)
    inner = block(["1.1", "1.2"], ["x", "y"], "\n\nz")
    text = f"{block(['1', '2'], [chr(10) + inner, ' w'], '  v')}\nend"
    ids = with_forced_starts(tokenizer.encode(text), text, tokenizer, tags)
    runs = [ids[run.start : run.stop] for run in find_forced(ids, tags)]
    first = [*tags.digits["1"], *tags.digits["."]]
    labels = [tags.ordinal(1), first + tags.ordinal(1), first + tags.ordinal(2), None, tags.ordinal(2), None]
    assert runs == [tags.reduce_prefix if label is None else tags.path_prefix(label) for label in labels]
    assert tokenizer.decode(ids) == text


def block(labels: list[str], paths: list[str], conclusion: str) -> str:
    goal = "".join(f"<Outline>\n{label}: o\n</Outline>\n" for label in labels)
    written = "".join(f"<Path>\n{label}:{path}\n</Path>\n" for label, path in zip(labels, paths, strict=True))
    return f"<Parallel>\n<Goal>\n{goal}</Goal>\n{written}<Conclusion>\n{conclusion}\n</Conclusion>\n</Parallel>"


# Collation and the loss


def row_of(ids: list[int], plain: bool = False) -> dict:
    labels = ids if plain else document_labels(ids, TAGS)
    return {"input_ids": PROMPT + ids, "labels": [IGNORE] * len(PROMPT) + labels, "plain": plain}


@pytest.mark.parametrize("attn", slow_unless(["sdpa"], ["sdpa", "eager"]))
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "mistral"])
def test_the_loss_with_a_collated_layout_is_the_loss_from_ids_alone(name, attn):
    model = tiny_model(name, attn)
    rows = [row_of(written(plan)[1]) for plan in PLANS.values()]
    batch = DocumentCollator(TAGS, PAD)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["segment_ids"].shape
    with torch.no_grad():
        collated = model(**batch).loss
        alone = model(**{name: batch[name] for name in ("input_ids", "labels", "attention_mask")}).loss
        assert collated == alone
        counts = [sum(label != IGNORE for label in row["labels"][1:]) for row in rows]
        single = [
            model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss * count
            for row, count in zip(rows, counts, strict=True)
        ]
    torch.testing.assert_close(collated, sum(single) / sum(counts), atol=1e-6, rtol=1e-6)  # the loss is float32


@pytest.mark.parametrize("beside", [(), (NESTED,)], ids=["alone", "beside a row with a block"])
def test_plain_rows_get_the_base_models_logits_even_where_they_hold_tags(beside):
    model, base = tiny_model("qwen2"), base_of("qwen2")
    rows = [row_of(written(plan)[1], plain=True) for plan in (NESTED, DEEP, (4,))]
    batch = DocumentCollator(TAGS, PAD)(rows + [row_of(written(plan)[1]) for plan in beside])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
        for number, row in enumerate(rows):
            ids = row["input_ids"]
            assert labels[number, : len(ids)].tolist() == row["labels"]
            assert (labels[number, len(ids) :] == IGNORE).all()
            theirs = base(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(logits[number, : len(ids)], theirs, atol=1e-10, rtol=0)


def base_of(name: str):
    base = AutoModelForCausalLM.from_config(tiny_config(name), attn_implementation="sdpa", dtype=torch.float64).eval()
    base.load_state_dict(tiny_model(name).state_dict())
    return base


def vars_of(config) -> dict:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: getattr(config, name) for name in (*names, "num_key_value_heads", "pad_token_id", "eos_token_id")}


def loss_of(logits: torch.Tensor, ids: list[int], learnt: list[int]) -> torch.Tensor:
    """Sum of the losses of the tokens at ``learnt``, each from the logits before it."""
    places = torch.tensor(learnt)
    return torch.nn.functional.cross_entropy(logits[0, places - 1], torch.tensor(ids)[places], reduction="sum")


def test_gradients_through_the_layout_are_those_of_each_path_run_as_its_own_sequence():
    ids = PROMPT + written((3, Forced(((4,), (9,), (2,)))))[1]
    labels = [IGNORE] * len(PROMPT) + document_labels(ids[len(PROMPT) :], TAGS)
    segments = build_layout(ids, TAGS).segment_ids.tolist()
    last_path = max(segments) - 1  # what follows the reduce sees all paths: no lone sequence has that context
    learnt = [at for at, label in enumerate(labels) if label != IGNORE and segments[at] <= last_path]

    # Starcoder2 has plain layer norms: other norms round to float32 inside, on the way back too.
    config = AutoConfig.for_model("starcoder2", **vars_of(tiny_config("qwen2")))
    torch.manual_seed(0)
    model = MultiverseForCausalLM.from_config(config, TAGS, dtype=torch.float64).eval()
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    base.load_state_dict(model.state_dict())
    loss_of(model(torch.tensor([ids])).logits, ids, learnt).backward()
    head = [at for at, segment in enumerate(segments) if segment == 0]
    for path in range(last_path + 1):
        places = head if path == 0 else head + [at for at, segment in enumerate(segments) if segment == path]
        own = [ids[at] for at in places]
        here = [index for index, at in enumerate(places) if at in learnt and segments[at] == path]
        logits = base(torch.tensor([own]), position_ids=torch.arange(len(own))[None]).logits
        loss_of(logits, own, here).backward()
    theirs = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-9, rtol=1e-9)


def test_text_ids_of_the_helpers_are_no_tags():
    assert min(TAGS.control_ids) > max(DIGITS.values())
    assert max(TAGS.control_ids) < FIRST_TEXT
