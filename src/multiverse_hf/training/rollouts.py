"""Answers for TRL's GRPOTrainer, with a mask of the tokens that the model chose.

GRPOTrainer(model, rollout_func=multiverse_rollout, ...) trains only on these tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from trl.models import unwrap_model_for_generation

from multiverse_hf.modeling.integrations import multiverse_model
from multiverse_hf.modeling.tags import encode_prompt


def multiverse_rollout(prompts: list[Any], trainer: Any) -> dict[str, list[Any] | None]:
    """Return an answer to each prompt, in the format of GRPOTrainer's ``rollout_func``.

    Args:
        prompts: one entry per answer. Chat messages are tokenized by
            :func:`~multiverse_hf.modeling.tags.encode_prompt`, so that tags in a user's text stay text. Strings are
            tokenized directly, as TRL does.
        trainer: trainer with the model and its ``generation_config``.

    Returns:
        Lists with an entry per prompt: ``prompt_ids``, ``completion_ids``, and ``env_mask``, which is 1 for tokens
            that
        the model chose and 0 for tokens that the engine wrote. A cut-off answer has no end token. ``logprobs`` is
        None, as the trainer computes them. Reward functions get ``parallelism``, ``length`` and ``finish_reason``.

    Raises:
        ValueError: if the model is no Multiverse model, or the trainer has tools.
    """
    if multiverse_model(trainer.model) is None:
        raise ValueError(
            f"multiverse_rollout needs a Multiverse model, got {type(trainer.model).__name__}; load it with "
            "MultiverseForCausalLM.from_pretrained, or by name with trust_remote_code=True"
        )
    if getattr(trainer, "tools", None):
        raise ValueError("multiverse_rollout calls no tools; leave out tools or rollout_func")
    tokenizer = trainer.processing_class
    rows = encode_prompts(tokenizer, prompts)
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]),
    }
    with whole_model(trainer) as model:
        output = model.generate(
            **{name: tensor.to(trainer.accelerator.device) for name, tensor in inputs.items()},
            generation_config=trainer.generation_config,
            return_dict_in_generate=True,
        )
    lengths = [stats.num_tokens for stats in output.stats]
    answers = [row[width : width + length] for row, length in zip(output.sequences.tolist(), lengths, strict=True)]
    chosen = [row[width : width + length] for row, length in zip(output.sampled_mask.tolist(), lengths, strict=True)]
    return {
        "prompt_ids": rows,
        # TRL reads the last token of each: an empty answer is an end token that the model did not choose
        "completion_ids": [ids or [tokenizer.eos_token_id] for ids in answers],
        "env_mask": [list(map(int, mask)) or [0] for mask in chosen],
        "logprobs": None,
        "parallelism": [stats.parallelism for stats in output.stats],
        "length": [stats.length for stats in output.stats],
        "finish_reason": [str(stats.finish_reason) for stats in output.stats],
    }


def encode_prompts(tokenizer: Any, prompts: list[Any]) -> list[list[int]]:
    """Return the token ids of prompts, which are chat messages or strings."""
    return [
        list(tokenizer(text=prompt)["input_ids"]) if isinstance(prompt, str) else encode_prompt(tokenizer, prompt)
        for prompt in prompts
    ]


@contextmanager
def whole_model(trainer: Any) -> Iterator[Any]:
    """Unwrap a trainer's model for generation, with all its weights and without gradients."""
    args, shards = trainer.args, getattr(trainer, "_dist", None)  # of FSDP 1, which must gather its weights
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as model,
        torch.no_grad(),
        shards.summon_full_params(trainer.model_wrapped, recurse=False) if shards else nullcontext(),
    ):
        yield model
