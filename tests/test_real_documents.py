"""The published sample documents, teacher-forced through the engine: it writes them back, and they replay."""

import functools
from pathlib import Path

import pytest
import torch
from helpers import documents, left_pad, replay_error
from test_tags import tiny_tokenizer
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import LogitsProcessor, PreTrainedTokenizerFast, Qwen2Config

from multiverse_hf.data.rows import IGNORE, document_labels
from multiverse_hf.documents import parse_document, validate
from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.tags import TagSet

SAMPLES = sorted((Path(__file__).parents[2] / "shared/data/multiverse-1k-samples").glob("*.xml"))
pytestmark = pytest.mark.skipif(not SAMPLES, reason="../shared/data/multiverse-1k-samples is not here")

LAST = 48  # tokens of a context that tell it from every other of the same length: labels are among them


@functools.cache
def tokenizer_of_samples() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on the samples, so that they are a few thousand tokens long."""
    tokenizer = RawTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([path.read_text() for path in SAMPLES], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)
    TagSet.add_to(fast)
    return fast


class FollowDocument(LogitsProcessor):
    """Forces the tokens of a document: by a branch's own visible ids, the token that comes after them."""

    def __init__(self, ids: list[int], tags: TagSet, sampled: list[int]) -> None:
        self.next: dict[tuple, int] = {}
        tensor, layout = torch.tensor(ids), build_layout(ids, tags)
        for at in sampled:
            seen = layout.visible[layout.segment_ids[at], layout.segment_ids[:at]]
            context = tensor[:at][seen]
            key = (len(context), tuple(context[-LAST:].tolist()))
            assert self.next.setdefault(key, ids[at]) == ids[at], "two contexts look alike: compare more tokens"

    def __call__(self, input_ids, scores):
        out = torch.full_like(scores, -torch.inf)
        for row, tail in enumerate(input_ids[:, -LAST:].tolist()):
            token = self.next[input_ids.shape[1], tuple(tail)]
            out[row, token] = scores[row, token]
        return out


def follow(text: str, prompt_text: str = "", **options):
    """Write a document through the engine of a one-layer model: its ids, what was written, and the replay's error."""
    tokenizer = tokenizer_of_samples()
    tags = TagSet.from_tokenizer(tokenizer)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=32768, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
    )  # fmt: skip
    model = MultiverseForCausalLM.from_config(config, tags, dtype=torch.float64).eval()
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    prompt = encode("A question." + prompt_text)
    ids = prompt + encode(text) + [tokenizer.eos_token_id]
    labels = document_labels(ids, tags)
    sampled = [at for at in range(len(prompt), len(ids)) if labels[at] != IGNORE]
    output = model.generate(
        torch.tensor([prompt]),
        logits_processor=[FollowDocument(ids, tags, sampled)],
        return_dict_in_generate=True,
        output_logits=True,
        max_new_tokens=30000,
        **options,
    )
    _, mask = left_pad([prompt])
    assert output.sampled_mask[0].nonzero().flatten().tolist() == sampled, "labels are what the engine samples"
    return ids, documents(output, [prompt])[0], replay_error(model, output, len(prompt), mask), output.stats[0]


LONGEST = sorted(SAMPLES, key=lambda path: path.stat().st_size)[-2:]
WHOLE = [pytest.param(path, marks=[pytest.mark.long] * (path in LONGEST), id=path.stem) for path in SAMPLES]


@pytest.mark.slow
@pytest.mark.parametrize("path", WHOLE)
def test_a_published_document_is_written_back_by_the_engine_and_replays(path):
    text = path.read_text()
    ids, written, error, stats = follow(text)
    assert written == ids
    assert error < 1e-9
    parsed = parse_document(text)
    assert stats.malformed == 0
    assert stats.num_forks == len(list(parsed.blocks()))
    assert stats.depth == parsed.depth
    assert stats.parallelism > 1


@pytest.mark.slow
@pytest.mark.parametrize("path", SAMPLES[1:3], ids=lambda path: path.stem)
def test_the_last_block_of_a_published_document_is_written_back_after_all_before_it(path):
    text = path.read_text()
    begin = text.rindex("<Parallel>\n<Goal>", 0, text.rindex("</Parallel>"))
    while text[:begin].count("<Path>") != text[:begin].count("</Path>"):  # a block outside every path
        begin = text.rindex("<Parallel>\n<Goal>", 0, begin)
    ids, written, error, stats = follow(text[begin : text.rindex("</Parallel>") + 11] + "\n</Think>", text[:begin])
    assert stats.num_forks >= 1
    assert error < 1e-9
    assert written == ids


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_any_published_document_parses_renders_validates_and_has_a_layout(path):
    tokenizer, text = tiny_tokenizer(), path.read_text()
    tags, parsed = TagSet.from_tokenizer(tokenizer), parse_document(text)
    assert parsed.render() == text
    assert validate(parsed) == []
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    layout = build_layout(ids, tags)
    # before the first block; then, for every block, its paths and what follows them
    assert len(layout.visible) == 1 + parsed.num_paths + len(list(parsed.blocks()))
    assert layout.length < len(ids)
