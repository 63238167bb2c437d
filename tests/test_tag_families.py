"""Families of checkpoints: read from data, found by their tags, and the same in every part of the library."""

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import EOS, FIRST_TEXT, PAD, make_tags, replay_error, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tags import plain_tokenizer
from transformers import AddedToken, LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM

from multiverse_hf.checkpoints import open_checkpoint
from multiverse_hf.cli import run
from multiverse_hf.documents import parse_document
from multiverse_hf.modeling import generation
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.families import FAMILIES, MULTIVERSE, NPR, Family
from multiverse_hf.modeling.labels import labels_for
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.tags import TagSet, encode_prompt

ALL = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
MOST = pytest.mark.parametrize(
    "family",
    [pytest.param(each, id=name, marks=[pytest.mark.slow] * (name == "npr")) for name, each in FAMILIES.items()],
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if not (loop.last and continue_final_message) %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# What the model writes by itself


class LikesTags(LogitsProcessor):
    """Makes tags likelier, so that a random model that may only write what the grammar allows opens blocks often."""

    def __init__(self, tags: TagSet, bonus: float = 4.0) -> None:
        self.tags, self.bonus = tags, bonus
        self.is_stateless = True

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, :FIRST_TEXT] -= self.bonus
        scores[:, self.tags.control_ids] += 2 * self.bonus
        return scores


@functools.cache
def model_of(family: Family, attn: str = "sdpa"):
    torch.manual_seed(0)
    config = tiny_config("qwen3")
    return MultiverseForCausalLM.from_config(config, make_tags(family), attn_implementation=attn).double().eval()


def write(model, prompts: list[list[int]], **options):
    """Sample answers with many blocks, and return them with the largest difference to one pass over each."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 120, "do_sample": True, "temperature": 1.0, "top_k": 0, "max_depth": 2} | options
    output = model.generate(
        ids, attention_mask=mask, logits_processor=LogitsProcessorList([LikesTags(model.tags)]), output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    rows = zip(output.sequences.tolist(), output.stats, strict=True)
    answers = [row[width : width + stats.num_tokens] for row, stats in rows]
    return output, answers, replay_error(model, output, width, mask)


def spelled(ids: list[int], tags: TagSet) -> str:
    """Spell ids: tags, labels, newlines, and a letter for each other text id."""
    texts = {token: tag for tag, token in tags.ids.items()} | tags.label_pieces | {tags.newline[0]: "\n", EOS: ""}
    return "".join(texts.get(token, "abcdefghij"[token % 10]) for token in ids)


@ALL
@pytest.mark.parametrize("decoding", ["packed", "simple"])
def test_answers_of_a_family_are_well_formed_and_replay_in_a_batch(family, decoding, monkeypatch):
    monkeypatch.setattr(generation, "Engine", functools.partial(Engine, decoding=decoding))
    output, answers, error = write(model_of(family), [[60], [61, 62, 63], [64, 65]], seed=3)
    assert error < 1e-9
    assert sum(stats.num_forks for stats in output.stats) >= 3
    for ids, stats in zip(answers, output.stats, strict=True):
        document = parse_document(spelled(ids, make_tags(family)), family)
        assert sum(1 for _ in document.blocks()) == stats.num_forks
        assert stats.malformed == 0


@ALL
@settings(max_examples=8)
@given(limit=st.integers(1, 90), total=st.integers(20, 200), seed=st.integers(0, 99))
def test_answers_of_a_family_that_a_limit_ends_are_well_formed_and_replay(family, limit, total, seed):
    options = {"max_new_tokens": limit, "max_total_tokens": total, "seed": seed}
    output, answers, error = write(model_of(family), [[60], [61, 62]], **options)
    assert error < 1e-9
    for ids, stats in zip(answers, output.stats, strict=True):
        assert stats.length <= limit
        assert stats.num_tokens <= total
        parse_document(spelled(ids, make_tags(family)), family)


@ALL
def test_labels_leave_out_what_the_engine_wrote_and_nothing_else(family):
    model = model_of(family)
    ids = torch.tensor([[60]])
    output = model.generate(
        ids, logits_processor=LogitsProcessorList([LikesTags(model.tags)]), return_dict_in_generate=True, seed=2,
        max_new_tokens=120, do_sample=True, top_k=0, max_depth=1,
    )  # fmt: skip
    assert output.stats[0].num_forks >= 1
    learnt, sampled = (labels_for(output.sequences, model) != -100)[0, 1:], output.sampled_mask[0, 1:]
    assert learnt[sampled].all()
    closing = output.sequences[0, 1:][learnt & ~sampled].tolist()
    assert set(closing) <= set(model.tags.roles), "tags that close what an end token or a limit ends"
    assert (~learnt).sum() >= 3 * output.stats[0].num_forks


@ALL
def test_a_document_cut_anywhere_is_continued_to_one_that_parses_and_replays(family):
    model = model_of(family)
    _, ((*document,),), _ = write(model, [[60]], seed=5, max_new_tokens=60)
    assert model.tags.trigger in document
    prompts = [[60, *document[:cut]] for cut in range(len(document))]
    _, answers, error = write(model, prompts[::3], seed=6, max_new_tokens=60)
    assert error < 1e-9
    for prompt, ids in zip(prompts[::3], answers, strict=True):
        parse_document(spelled([*prompt, *ids], model.tags), family)


@MOST
def test_limits_are_the_familys_where_a_call_does_not_say(family):
    _, answers, _ = write(model_of(family), [[60]], max_depth=None, seed=8, max_new_tokens=400)
    document = parse_document(spelled(answers[0], make_tags(family)), family)
    blocks = [block for block, _ in document.blocks()]
    assert blocks
    assert document.depth <= family.max_depth
    assert max(len(block.paths) for block in blocks) <= family.max_paths
    assert family.max_blocks is None or len(blocks) <= family.max_blocks


def test_a_path_is_penalized_for_its_own_repetitions_only():
    model, tags = model_of(MULTIVERSE), make_tags()
    outline = [tags.open("outline"), 60, tags.close("outline")]
    block = [tags.open("parallel"), tags.open("goal"), *outline, *outline, tags.close("goal")]
    ids = torch.tensor([[60, 61, *block]])

    def paths(**options) -> list[list[int]]:
        options = {"max_new_tokens": 60, "do_sample": False, "max_path_tokens": 20, "max_depth": 0} | options
        answer = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
        ends = [at for at, token in enumerate(answer) if token == tags.close("path")]
        return [answer[: ends[0]][4:], answer[ends[0] + 1 : ends[1]][4:]]  # without what the engine writes

    for plain, strict in zip(paths(), paths(path_repetition_penalty=1e6), strict=True):
        assert len(plain) > len(set(plain)), "the model repeats itself"
        assert len(strict) == len(set(strict))
        assert strict[0] == plain[0], "text before the path counts nothing"
    first, second = paths(path_repetition_penalty=1e6)
    assert set(first) & set(second), "nor does its sibling's"


# Data


@ALL
def test_a_family_is_stored_with_a_checkpoint_and_found_by_its_tags(family):
    tags = make_tags(family)
    assert TagSet.from_dict(json.loads(json.dumps(tags.to_dict()))).names == family
    old = {name: value for name, value in tags.to_dict().items() if name != "family"}
    assert TagSet.from_dict(old).names == family, "a checkpoint of before families were data"
    tokenizer = plain_tokenizer()
    TagSet.add_to(tokenizer, family)
    assert TagSet.from_tokenizer(tokenizer).names == family


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"goal": None}, "goal and outline, or neither"),
        ({"goal": None, "outline": None}, "num_paths is for families without outlines, which need it"),
        ({"num_paths": 2}, "num_paths is for families without outlines"),
        ({"goal": None, "outline": None, "num_paths": 2, "path_start": "<path>", "parallel": None}, "parallel tag"),
        ({"goal": None, "outline": None, "num_paths": 2}, "labels come from outlines"),
        ({"path_start": "Path: "}, "the engine writes newlines, tags"),
        ({"path_start": "\n"}, "path_start writes <path>"),
        ({"reduce_start": "</parallel>"}, "reduce_start writes <conclusion> </conclusion> </parallel> in this order"),
        ({"reduce_start": ""}, "the engine begins what follows"),
        ({"reduce_start": "<summary>"}, "got '<summary>'"),
    ],
)
def test_rules_that_do_not_fit_together_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        Family(**rules)


def test_the_command_lists_all_families(capsys):
    assert run(["families"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in FAMILIES)
    assert r"\n<step>\n1:" in text
    assert run(["families", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == list(FAMILIES)
    assert found["npr"]["path_repetition_penalty"] == 1.02


# A checkpoint as another project published it


def save_published(folder: Path, family: Family) -> Path:
    """Save a checkpoint as transformers' own classes do: no code, no tags in its config, tags as added tokens."""
    tokenizer = plain_tokenizer()
    ends = [AddedToken(text, special=True) for text in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens([*ends, *(AddedToken(tag, special=False) for tag in family.tokens)])
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template = "<|im_end|>", "<end>", CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)  # as Qwen3's
    model.save_pretrained(folder)
    assert not list(folder.glob("*.py"))
    assert "multiverse" not in (folder / "config.json").read_text()
    return folder


HALF = "<guideline>\n<plan>1: a</plan>\n<plan>2: b</plan>\n</guideline>"
ASKED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": HALF}]


def test_a_folder_laid_out_as_nprs_loads_and_branches_and_replays(tmp_path):
    from transformers import AutoTokenizer

    path = save_published(tmp_path, NPR)
    model = MultiverseForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    assert model.tags.names == NPR
    assert MultiverseForCausalLM.from_pretrained(path, family="npr").tags.names == NPR
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = encode_prompt(tokenizer, ASKED, return_tensors="pt")
    options = {"max_new_tokens": 80, "max_path_tokens": 24, "seed": 1}
    output = model.generate(ids, output_logits=True, return_dict_in_generate=True, **options)
    assert replay_error(model, output, ids.shape[1], torch.ones_like(ids)) < 1e-9
    assert output.stats[0].max_width == 2
    text = tokenizer.decode(output.sequences[0, ids.shape[1] :])
    assert text.startswith("\n<step>\n1:")
    assert "\n<step>\n2:" in text
    assert "</step>\n<takeaway>\n" in text
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert MultiverseForCausalLM.from_pretrained(tmp_path / "saved").tags.names == NPR
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text())["max_paths"] == 5


def test_a_folder_laid_out_as_nprs_is_served(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")
    openai = pytest.importorskip("openai")
    from endpoint import serving

    with serving(str(save_published(tmp_path, NPR)), name="npr") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)
        extra = {"multiverse": {"max_path_tokens": 24, "max_new_tokens": 80}}
        answer = client.chat.completions.create(model="npr", messages=ASKED, seed=1, extra_body=extra)
        assert "<step>\n2:" in answer.choices[0].message.content
        assert "<takeaway>" in answer.choices[0].message.content


@pytest.mark.slow
def test_a_folder_laid_out_as_nprs_is_evaluated(tmp_path, unquiet):
    pytest.importorskip("pyarrow")
    pytest.importorskip("matplotlib")
    path, rows = save_published(tmp_path / "npr", NPR), tmp_path / "own.jsonl"
    rows.write_text('{"problem": "2+2?", "answer": "4"}\n')
    options = ["--rule", "exact", "--max-new-tokens", "24", "--output", str(tmp_path / "run")]
    assert run(["eval", "--model", str(path), "--task", str(rows), *options]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (task,) = results["tasks"].values()
    assert task["problems"] == 1
    taken = {name: results["sampling"][name] for name in ("temperature", "top_p", "path_repetition_penalty")}
    assert taken == {"temperature": 1.0, "top_p": 0.7, "path_repetition_penalty": 1.02}
    assert results["family"] == "npr"
    assert results["of_record"] == ["temperature", "top_p"]
    assert results["prompts"]["template"] == "{problem}", "no sentence of another family's"
    assert "(temperature, top_p of record of npr)" in (tmp_path / "run" / "report.md").read_text()


def test_the_record_is_taken_where_a_user_does_not_say(tmp_path, capsys, unquiet):
    path = save_published(tmp_path, NPR)
    checkpoint = open_checkpoint(str(path))
    record = {"do_sample": True, "temperature": 1.0, "top_p": 0.7, "top_k": 0, "path_repetition_penalty": 1.02}
    assert checkpoint.with_record({}) == record
    assert checkpoint.with_record({"temperature": 0.5}) == record | {"temperature": 0.5}
    assert checkpoint.with_record({"temperature": None}) == record
    assert checkpoint.with_record({"do_sample": False}) == {"do_sample": False}
    assert open_checkpoint(None).record == {}, "the embedded models are greedy"

    def generate(*options: str) -> dict:
        assert run(["generate", "2+2?", "--model", str(path), "--max-new-tokens", "4", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    said = generate("--seed", "1")
    assert (said["prompt"], said["family"], said["of_record"]) == ("2+2?", "npr", record)
    assert generate("--greedy")["of_record"] == {}
    assert set(generate("--top-p", "0.9")["of_record"]) == {"temperature", "top_k", "path_repetition_penalty"}


def test_a_request_to_the_endpoint_takes_the_record_where_it_does_not_say(tmp_path):
    pytest.importorskip("fastapi")
    from multiverse_hf.serving.config import ServerConfig
    from multiverse_hf.serving.protocol import ChatRequest
    from multiverse_hf.serving.reading import read_chat

    checkpoint = open_checkpoint(str(save_published(tmp_path, NPR)))

    def options(**fields) -> dict:
        body = ChatRequest(model="npr", messages=[{"role": "user", "content": "2+2?"}], **fields)
        found = read_chat(body, checkpoint, ServerConfig("npr")).options
        return {name: value for name, value in found.items() if name in (*NPR.sampling, "repetition_penalty")}

    assert options() == NPR.sampling
    assert options(temperature=0.2) == NPR.sampling | {"temperature": 0.2}
    assert options(temperature=0) == {"do_sample": False}


def test_a_prompt_begins_with_the_system_message_of_record_unless_it_has_one(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_published(tmp_path, NPR))
    family = replace(NPR, system_prompt="Write a <guideline>.")
    ids = encode_prompt(tokenizer, "2+2?", family)
    user = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == f"<|im_start|>system\nWrite a <guideline>.<|im_end|>\n{user}"
    assert not set(ids) & set(TagSet.from_tokenizer(tokenizer).control_ids), "its tags are text"
    own = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]
    ids = encode_prompt(tokenizer, own, family)
    assert tokenizer.decode(ids) == f"<|im_start|>system\nBe short.<|im_end|>\n{user}"
