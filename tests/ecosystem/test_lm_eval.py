"""lm-eval's ``hf`` model on a Multiverse model: by object, and by a folder's name with ``trust_remote_code``."""

import copy
import json

import pytest
import torch

from multiverse_hf import encode_prompt

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # the package alone takes seconds to import

PROMPTS = [
    "A=19-7+12; B=8+15-3; C=5+6; total? Think step by step and in parallel before answering.",
    "A=9+7; B=8+5; total? Think step by step and in parallel before answering.",
    "A=5+6; total? Think step by step and in parallel before answering.",
    "A=5+6; B=7+8; total? Think step by step before answering.",
]


@pytest.fixture(scope="module", params=["object", "name"])
def harness(request, folder, tokenizer):
    """lm-eval's model, made in the two ways its users make it."""
    from lm_eval.models.huggingface import HFLM

    from multiverse_hf import MultiverseForCausalLM, embedded_model

    if request.param == "name":
        return HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", batch_size=4)
    return HFLM(pretrained=MultiverseForCausalLM.from_pretrained(embedded_model()), tokenizer=tokenizer, batch_size=4)


def ask(harness, kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    requests = [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]
    return getattr(harness, kind)(requests, disable_tqdm=True)


def chat(harness, prompt: str) -> str:
    return harness.apply_chat_template([{"role": "user", "content": prompt}])


def answer(model, tokenizer, prompt: str):
    ids = encode_prompt(tokenizer, prompt, return_tensors="pt")
    output = model.generate(ids, max_new_tokens=600, return_dict_in_generate=True)
    return output, ids.shape[1]


@pytest.mark.parametrize("stop", ["<|im_end|>", "Answer", "ends at 24", "\nB"])
def test_generate_until_answers_a_batch_and_stops_each_row_by_itself(harness, tokenizer, stop):
    wanted = []
    for prompt in PROMPTS:
        output, length = answer(harness.model, tokenizer, prompt)
        wanted.append(tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True))
    assert sum("<Path>" in each for each in wanted) == 2
    asked = [(chat(harness, prompt), {"until": [stop], "max_gen_toks": 600}) for prompt in PROMPTS]
    found = ask(harness, "generate_until", asked)
    # lm-eval itself cuts an answer at the first stop string.
    assert [each.rstrip() for each in found] == [each.partition(stop)[0].rstrip() for each in wanted]


@pytest.mark.parametrize("count", [1, 4])
def test_a_stop_inside_a_path_closes_that_path_alone(harness, tokenizer, count):
    from lm_eval.models.utils_hf import stop_sequences_criteria

    batch = encode_prompt(tokenizer, PROMPTS[:count], return_tensors="pt")
    length = batch["input_ids"].shape[1]
    criteria = stop_sequences_criteria(tokenizer, ["ends at 24"], length, count)
    written = harness.model.generate(**batch, max_new_tokens=600, stopping_criteria=criteria)
    texts = tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)
    assert "ends at 24</Path>" in texts[0]
    assert "ends at 20=20+0." in texts[0], "its siblings go on"
    for text, number in zip(texts, (55, 29, 11, 26)[:count], strict=True):
        assert text.endswith(f"Answer: {number}"), "and so do the answer and the other rows"


def test_a_stop_inside_a_path_ends_the_answer_where_that_is_asked_for(harness, tokenizer):
    asked = {"until": ["ends at 24"], "max_gen_toks": 600, "stop_scope": "answer"}
    (found,) = ask(harness, "generate_until", [(chat(harness, PROMPTS[0]), asked)])
    output, length = answer(harness.model, tokenizer, PROMPTS[0])
    text = tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True)
    assert found.rstrip() == text.partition("ends at 24")[0].rstrip()


def test_log_likelihoods_are_those_of_the_tokens_the_model_chose(harness, tokenizer):
    """For a model whose forced tokens are improbable: they count nothing, rolling and as an answer."""
    output, length = answer(harness.model, tokenizer, PROMPTS[1])
    document, chosen = output.sequences, output.sampled_mask[0].bool().clone()
    chosen[:length] = True
    assert (~chosen).sum() > 10
    text = tokenizer.decode(document[0])
    assert tokenizer(text, add_special_tokens=False).input_ids == document[0].tolist()
    prompt = chat(harness, PROMPTS[1])

    weights = copy.deepcopy(harness.model.state_dict())
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            for weight in harness.model.parameters():
                weight.mul_(1 + 0.5 * torch.randn_like(weight))
        (rolling,) = ask(harness, "loglikelihood_rolling", [(text,)])
        ((answered, _),) = ask(harness, "loglikelihood", [(prompt, text[len(prompt) :])])
        harness.model.raw_forced_logits = True
        begun = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), document], 1)  # as lm-eval begins a rolling row
        with torch.no_grad():
            every, own = (
                harness.model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
                for ids in (begun, document)
            )
    finally:
        harness.model.raw_forced_logits = False
        harness.model.load_state_dict(weights)
    assert every[~chosen].sum() < -20
    assert rolling == pytest.approx(every[chosen].sum().item(), abs=0.01)
    start = len(tokenizer(prompt.rstrip()).input_ids)  # white space at a prompt's end is part of the answer to it
    assert answered == pytest.approx(own[start - 1 :][chosen[start:]].sum().item(), abs=0.01)


def test_a_task_of_multiple_choice_scores_whole_documents(harness, tokenizer, tmp_path):
    """A task of one's own, run as ``lm_eval`` runs it: which answer ends a document that has paths."""
    rows = []
    for prompt in PROMPTS[:2]:
        output, length = answer(harness.model, tokenizer, prompt)
        text = tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True)
        thought, _, number = text.rpartition(" ")
        rows.append({"question": chat(harness, prompt) + thought, "right": number, "choices": ["17", number, "98"]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "totals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{choices.index(right)}}",
        "metric_list": [{"metric": "acc"}],
    }
    results = lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=0, log_samples=True)
    assert results["results"]["totals"]["acc,none"] == 1
    for sample in results["samples"]["totals"]:
        (wrong, _), (right, greedy), _ = (each[0] for each in sample["resps"])
        assert right > -0.1
        assert greedy
        assert wrong < -3
