"""Measures of answers for ``lighteval accelerate``, which keeps only their texts and padded ids.

LightEval's ``TransformersModel`` has no hook for measures, so it is wrapped. After it has answered, tokens and length
are counted from the ids and stored in ``doc.specific`` for metrics. Its calls of ``generate`` are also corrected: see
:func:`measure_transformers`.
"""

import functools
from collections.abc import Sequence
from typing import Any

from multiverse_hf.evaluation.metrics import measure_ids
from multiverse_hf.modeling.tags import MULTIVERSE, TagSet

MEASURES = "measures"  # key of ``doc.specific``: num_tokens, length, parallelism and num_forks of each answer


def measure_transformers() -> None:
    """Wrap LightEval's ``TransformersModel``, once per process.

    Three of its calls of ``generate`` are corrected. It asks for scores, which it never reads and branches cannot
    return. It ignores a padding token of id 0, and pads with the end token. Its criteria for stop sequences expect one
    row for each prompt, but an engine that branches has one row for each branch.
    """
    import torch

    with_gradients = torch.is_grad_enabled()
    from lighteval.models.transformers import transformers_model

    torch.set_grad_enabled(with_gradients)  # importing it turns gradients off for the whole process
    model = transformers_model.TransformersModel
    if getattr(model.greedy_until, "measures", False):
        return
    answer = model.greedy_until

    @functools.wraps(answer)
    def greedy_until(self: Any, docs: list[Any]) -> list[Any]:
        generate = self.model.generate
        self.model.generate = _mended(generate, self.tokenizer.pad_token_id)
        try:
            responses = answer(self, docs)
        finally:
            self.model.generate = generate
        tags = find_tags(self.tokenizer)
        for doc, response in zip(docs, responses, strict=True):
            budget = self.max_length - len(response.input_tokens)
            budget = min(budget, doc.generation_size or budget)
            answers = [strip(ids, self.tokenizer, tags, budget) for ids in response.output_tokens]
            doc.specific[MEASURES] = [measure(ids, tags) for ids in answers]
        return responses

    greedy_until.measures = True
    model.greedy_until = greedy_until
    transformers_model.stop_sequences_criteria = stop_sequences_criteria


def _mended(generate: Any, pad: int | None) -> Any:
    def mended(**options: Any) -> Any:
        options["output_scores"] = False
        if pad is not None:
            options["pad_token_id"] = pad
        return generate(**options)

    return mended


def stop_sequences_criteria(tokenizer: Any, stop_sequences: Sequence[str], batch: Any) -> Any:
    """Return transformers' criteria for stop sequences, without the end token, which ``generate`` knows."""
    from transformers import StoppingCriteriaList
    from transformers.generation.stopping_criteria import StopStringCriteria

    texts = [text for text in stop_sequences if text and text != tokenizer.eos_token]
    return StoppingCriteriaList([StopStringCriteria(tokenizer, texts)] if texts else [])


def find_tags(tokenizer: Any) -> TagSet | None:
    """Return the tags of a tokenizer, None if it has none."""
    if not set(MULTIVERSE.tokens) & set(tokenizer.get_vocab()):
        return None
    return TagSet.from_tokenizer(tokenizer)


def strip(ids: Sequence[int], tokenizer: Any, tags: TagSet | None, budget: int) -> list[int]:
    """Return ids without padding: LightEval pads answers to the longest of their batch.

    If the padding is the end token, its first one is the answer's own end. If that would be past the budget, the
    answer was cut off and has none.
    """
    ids = [int(token) for token in ids]
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    length = len(ids)
    while length and ids[length - 1] == pad:
        length -= 1
    if pad == end and length < len(ids) and measure(ids[: length + 1], tags)["length"] <= budget:
        length += 1
    return ids[:length]


def measure(ids: Sequence[int], tags: TagSet | None) -> dict[str, Any]:
    """Return tokens, length, # parallel and forks of an answer."""
    if tags is None:
        return {"num_tokens": len(ids), "length": len(ids), "parallelism": 1.0, "num_forks": 0}
    from multiverse_hf.modeling.grammar import Event, Scanner

    measures, scanner = measure_ids(ids, tags), Scanner(tags)
    forks = sum(scanner.feed(token) is Event.FORK for token in ids)
    counted = {"num_tokens": measures.num_tokens, "length": measures.length, "num_forks": forks}
    return counted | {"parallelism": measures.parallelism}
