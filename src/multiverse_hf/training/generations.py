"""Real answers at each evaluation: accuracy, well-formedness and # parallel of generated documents."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from multiverse_hf.data.records import Form, Record, read_answer
from multiverse_hf.data.rows import RowEncoder
from multiverse_hf.documents import is_well_formed
from multiverse_hf.modeling.tags import encode_prompt


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer with its measures."""

    prompt: Sequence[Mapping[str, str]]
    document: str
    expected: str | None  # the record's answer, None if it has none
    parallelism: float
    length: int
    num_tokens: int
    num_forks: int
    finish_reason: str
    is_well_formed: bool

    @property
    def is_right(self) -> bool | None:
        """Whether the last line ``Answer: ...`` is exactly the record's; None if the record has none."""
        return None if self.expected is None else read_answer(self.document) == self.expected


def write_answers(
    model: Any, encoder: RowEncoder, records: Sequence[Record], form: Form, max_new_tokens: int, batch_size: int
) -> list[Generation]:
    """Return a model's greedy answers to the prompts of records."""
    tokenizer, names = encoder.tokenizer, encoder.tags.names
    hidden = set(tokenizer.all_special_ids) - set(encoder.tags.control_ids)
    samples = []
    for begin in range(0, len(records), batch_size):
        part = records[begin : begin + batch_size]
        prompts = [encoder.prompt(record, form) for record in part]
        batch = encode_prompt(tokenizer, prompts, names).to(model.device)
        output = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=True
        )
        answers = output.sequences[:, batch["input_ids"].shape[1] :].tolist()
        for record, prompt, ids, stats in zip(part, prompts, answers, output.stats, strict=True):
            text = tokenizer.decode([i for i in ids[: stats.num_tokens] if i not in hidden], skip_special_tokens=False)
            samples.append(
                Generation(
                    prompt, text, read_answer(record.document.render()), stats.parallelism, stats.length,
                    stats.num_tokens, stats.num_forks, str(stats.finish_reason), is_well_formed(text, names),
                )
            )  # fmt: skip
    return samples


def summary(samples: Sequence[Generation]) -> dict[str, float]:
    """Return means over answers; the accuracy is over answers whose record has one."""
    judged = [sample.is_right for sample in samples if sample.is_right is not None]
    values = {
        "well_formed": [sample.is_well_formed for sample in samples],
        "parallelism": [sample.parallelism for sample in samples],
        "forks": [sample.num_forks > 0 for sample in samples],
        "ended": [sample.finish_reason == "stop" for sample in samples],
        "length": [sample.length for sample in samples],
        "tokens": [sample.num_tokens for sample in samples],
    } | ({"accuracy": judged} if judged else {})
    return {name: sum(map(float, each)) / len(each) for name, each in values.items()}


class GenerationCallback(TrainerCallback):
    """Lets the model answer a few prompts at each evaluation.

    It logs the means as ``eval_generated_*``, and stores the answers in ``generations/step-N.jsonl``. Every process
    generates the same answers, as a model spread over processes needs all of them for each step.

    Args:
        trainer: the trainer with the model and the log.
        encoder: encodes the prompts.
        records: records with the prompts.
        form: form of the suffix at the prompts' end.
        max_new_tokens: most positions past the prompt.
    """

    def __init__(
        self, trainer: Any, encoder: RowEncoder, records: Sequence[Record], form: Form, max_new_tokens: int
    ) -> None:
        self.trainer, self.encoder, self.records = trainer, encoder, list(records)
        self.form, self.max_new_tokens = form, max_new_tokens

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Generate and store the answers, and log their means."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model_wrapped, keep_torch_compile=False)
        was_training, used_cache = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True  # the trainer turned it off
        try:
            with torch.no_grad(), self.trainer.compute_loss_context_manager():
                samples = write_answers(
                    model, self.encoder, self.records, self.form, self.max_new_tokens, args.eval_batch_size
                )
        finally:
            model.config.use_cache = used_cache
            model.train(was_training)
        if state.is_world_process_zero:
            folder = Path(args.output_dir, "generations")
            folder.mkdir(parents=True, exist_ok=True)
            lines = [
                json.dumps(
                    {name: getattr(sample, name) for name in (*Generation.__slots__, "is_right")}, ensure_ascii=False
                )
                for sample in samples
            ]
            Path(folder, f"step-{state.global_step}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        was_mode = self.trainer.model.training
        self.trainer.model.eval()  # TRL chooses the log's kind by it
        self.trainer.log({f"eval_generated_{name}": value for name, value in summary(samples).items()})
        self.trainer.model.train(was_mode)
