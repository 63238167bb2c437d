"""inspect-ai's ``hf`` provider on a checkpoint's folder, as its users call it."""

import math

import pytest

from multiverse_hf import MultiverseForCausalLM, encode_prompt

pytest.importorskip("inspect_ai")
pytestmark = pytest.mark.slow  # inspect-ai collects a batch for seconds

ASKED = {
    "A=5+6; B=7+8; total? Think step by step and in parallel before answering.": "26",
    "A=5+6; total? Think step by step and in parallel before answering.": "11",
}


def run(folder, tmp_path, **config):
    """Evaluate; return the log, whose samples are in the order of ``ASKED``."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig
    from inspect_ai.scorer import includes

    samples = [Sample(input=prompt, target=f"Answer: {answer}") for prompt, answer in ASKED.items()]
    model_args = {"model_path": str(folder), "trust_remote_code": True, "device": "cpu", "do_sample": False}
    (log,) = eval(
        Task(dataset=samples, scorer=includes(), config=GenerateConfig(max_tokens=300, **config)),
        model="hf/local",
        model_args=model_args,
        log_dir=str(tmp_path),
        display="none",
    )
    return log


def test_samples_are_answered_with_branches_and_scored(folder, tokenizer, tmp_path):
    log = run(folder, tmp_path)
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1
    model = MultiverseForCausalLM.from_pretrained(folder)
    for sample, prompt in zip(log.samples, ASKED, strict=True):
        ids = encode_prompt(tokenizer, prompt, return_tensors="pt")
        expected = tokenizer.decode(model.generate(ids, max_new_tokens=300)[0, ids.shape[1] :], True)
        assert sample.output.completion == expected
    assert "<Path>" in log.samples[0].output.completion


def test_log_probabilities_and_stop_strings_are_given(folder, tmp_path):
    log = run(folder, tmp_path, logprobs=True, top_logprobs=2, stop_seqs=["</Think>"])
    assert log.status == "success", log.error
    for sample, answer in zip(log.samples, ASKED.values(), strict=True):
        assert sample.output.completion.rstrip().endswith("</Think>")
        assert f"={answer}" in sample.output.completion
        content = sample.output.choices[0].logprobs.content
        assert len(content) > 50
        assert all(len(each.top_logprobs) == 2 for each in content)
        assert all(-math.inf < each.logprob <= 0 for each in content)
        assert sum(each.logprob < 0 for each in content) > 30  # the engine wrote the others: 0
