"""transformers' own trainers: losses, smoothed ones too, metrics and answers, of what the model chose."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt
from multiverse_hf.modeling.labels import forced_mask

PROMPT = "A=9+7; B=8+5; total? Think step by step and in parallel before answering."


@pytest.fixture(scope="module")
def row() -> list[int]:
    """A prompt and the document that the model answers."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    ids = encode_prompt(tokenizer, PROMPT, return_tensors="pt")
    return MultiverseForCausalLM.from_pretrained(embedded_model()).generate(ids, max_new_tokens=400)[0].tolist()


def new(trainer, arguments, folder: Path, rows: list[dict], hooks: dict | None = None, **options):
    tokenizer = AutoTokenizer.from_pretrained(
        embedded_model(), padding_side="left" if trainer is Seq2SeqTrainer else "right"
    )
    args = {"use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 1, "disable_tqdm": True}
    return trainer(
        model=MultiverseForCausalLM.from_pretrained(embedded_model()),
        args=arguments(output_dir=str(folder), **args, **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        **(hooks or {}),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_the_mean_over_the_labels_where_forced_tokens_cost_nothing(smoothing, row, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in (row, row[:-5])]
    trainer = new(Trainer, TrainingArguments, tmp_path, rows, label_smoothing_factor=smoothing)
    total, count = 0.0, 0
    for each in rows:
        ids = torch.tensor([each["input_ids"]])
        with torch.no_grad():
            scores = trainer.model.eval()(ids).logits[:, :-1].log_softmax(-1)
        loss = (1 - smoothing) * -scores.gather(-1, ids[:, 1:, None])[..., 0] - smoothing * scores.mean(-1)
        total += loss[~forced_mask(ids, trainer.model.tags)[:, 1:]].sum().item()
        count += ids.shape[1] - 1
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(total / count, rel=1e-4)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss, rel=1e-4)


def test_metrics_are_given_the_layouts_logits(row, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in (row, row[:-5])]

    def accuracy(seen) -> dict[str, float]:
        labels = seen.label_ids[:, 1:]
        return {"accuracy": float((seen.predictions[:, :-1] == labels)[labels != -100].mean())}

    hooks = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    trainer = new(Trainer, TrainingArguments, tmp_path, rows, hooks)
    answer = len(encode_prompt(AutoTokenizer.from_pretrained(embedded_model()), PROMPT))
    metrics = trainer.predict([{"input_ids": row, "labels": [-100] * answer + row[answer:]}]).metrics
    assert metrics["test_accuracy"] == 1, "the model wrote these tokens, or the engine did"


def test_answers_are_written_with_branches_for_generative_metrics(row, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    prompts = [encode_prompt(tokenizer, prompt) for prompt in (PROMPT, "A=5+6; total?")]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in prompts]
    options = {"predict_with_generate": True, "generation_max_length": 500}
    trainer = new(Seq2SeqTrainer, Seq2SeqTrainingArguments, tmp_path, rows, **options)
    written = trainer.predict(rows).predictions[0].tolist()
    assert written[: len(row)] == row
