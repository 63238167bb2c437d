"""Grammars of xgrammar and outlines, whose processors keep a state for each row, as their users pass them."""

from typing import Literal

import pytest
import torch

from multiverse_hf import encode_prompt

pytestmark = pytest.mark.slow
FORKS = "A=5+6; B=7+8; total? Think step by step and in parallel before answering."
SHORT = "A=5+6; total?"
STRUCTURES = pytest.mark.parametrize("options", [{"structure": "off"}, {}], ids=["off", "guided"])


@pytest.fixture(scope="module")
def compiler(plain, tokenizer):
    xgrammar = pytest.importorskip("xgrammar")
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=plain.config.vocab_size)
    return xgrammar.GrammarCompiler(info)


def processor(grammar) -> list:
    from xgrammar.contrib.hf import LogitsProcessor

    return [LogitsProcessor(grammar)]  # its own manual: a new one for each call


@STRUCTURES
@pytest.mark.parametrize("prompts", [[FORKS], [FORKS, SHORT]], ids=["one", "unequal lengths"])
def test_a_grammar_of_xgrammar_gives_what_the_base_class_gives(model, plain, tokenizer, compiler, prompts, options):
    batch = encode_prompt(tokenizer, prompts, return_tensors="pt")
    for regex in ("Answer: [0-9]+", "[0-9]{3}=[0-9]{3,5}"):
        grammar = compiler.compile_regex(regex)
        found = model.generate(**batch, max_new_tokens=20, logits_processor=processor(grammar), **options)
        expected = plain.generate(**batch, max_new_tokens=20, logits_processor=processor(grammar))
        assert torch.equal(found, expected), regex


@pytest.mark.parametrize("prompts", [[FORKS], [FORKS, SHORT]], ids=["one", "unequal lengths"])
def test_a_grammar_of_xgrammar_at_a_fork_is_refused_with_the_way_out(model, tokenizer, compiler, prompts):
    batch = encode_prompt(tokenizer, prompts, return_tensors="pt")
    grammar = compiler.compile_grammar("root ::= [^]*")
    with pytest.raises(ValueError, match="structure='off'"):
        model.generate(**batch, max_new_tokens=300, logits_processor=processor(grammar))


@STRUCTURES
def test_outlines_gives_what_it_gives_on_the_base_class(model, plain, tokenizer, options):
    outlines = pytest.importorskip("outlines")
    ours, theirs = (outlines.from_transformers(each, tokenizer) for each in (model, plain))
    for kind in (outlines.types.Regex("Answer: [0-9]{2}"), Literal["yes", "no"], int):
        expected = theirs(FORKS, kind, max_new_tokens=20)
        assert ours(FORKS, kind, max_new_tokens=20, **options) == expected
        expected = outlines.Generator(theirs, kind).batch([FORKS, SHORT], max_new_tokens=20)
        assert outlines.Generator(ours, kind).batch([FORKS, SHORT], max_new_tokens=20, **options) == expected


def test_outlines_branches_without_a_grammar_and_refuses_a_fork_within_one(model, tokenizer):
    outlines = pytest.importorskip("outlines")
    asked = outlines.from_transformers(model, tokenizer)
    chat = outlines.inputs.Chat([{"role": "user", "content": FORKS}])
    free = asked(chat, max_new_tokens=300)
    assert "<Path>\n2: " in free
    assert free.endswith("Answer: 26")
    with pytest.raises(ValueError, match="structure='off'"):
        asked(chat, outlines.types.Regex(r"[\s\S]*"), max_new_tokens=300)
