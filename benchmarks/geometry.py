"""Sizes of models to measure with random weights, the device they go to, and whether they fit there."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2Config
from workload import EOS, silence_tags

from multiverse_hf.modeling.cpu import can_pack
from multiverse_hf.modeling.engine_config import free_memory
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.tags import TagSet

_QWEN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rms_norm_eps": 1e-6}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {  # for tests
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 4096,
    },
    "cpu-0.24b": {  # layers as wide as those of 0.5B, so that weights do not fit a CPU's cache
        "vocab_size": 32_000, "hidden_size": 896, "num_hidden_layers": 12, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32_768,
    },
    "qwen2.5-0.5b": _QWEN | {
        "vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": _QWEN | {
        "vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18_944, "max_position_embeddings": 131_072,
    },
    "qwen2.5-32b": _QWEN | {
        "vocab_size": 152_064, "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40,
        "num_key_value_heads": 8, "intermediate_size": 27_648, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
DTYPE = torch.bfloat16
# Tokens of cache beyond what the answers take. Near its end the engine counts, before every token of every branch,
# what it takes to close all of them; an engine in service is seldom there. 2**16 keeps 32 paths away from it.
SPARE_TOKENS = 1 << 16
WORKSPACE = 1 << 29  # bytes; of kernels, and what the allocator loses


def make_config(geometry: str, num_layers: int | None = None) -> Qwen2Config:
    """Make the config of a geometry, or of its first layers."""
    sizes = GEOMETRIES[geometry] | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    return Qwen2Config(**sizes, eos_token_id=EOS, pad_token_id=EOS, bos_token_id=None)


def make_model(
    geometry: str,
    device: torch.device,
    tags: TagSet,
    seed: int,
    dtype: torch.dtype = DTYPE,
    num_layers: int | None = None,
) -> PreTrainedModel:
    """Make a model with random weights that writes tags only where it has to.

    The weights are made where they stay, in their own kind, without a copy of another: 32 B of them take 61 GiB.
    """
    torch.manual_seed(seed)
    with device:
        model = MultiverseForCausalLM.from_config(make_config(geometry, num_layers), tags, dtype=dtype).eval()
    silence_tags(model, tags)
    return model


def count_parameters(geometry: str, tags: TagSet, num_layers: int | None = None) -> int:
    """Count the parameters of a geometry, shared ones once, without making any."""
    with torch.device("meta"):
        model = MultiverseForCausalLM.from_config(make_config(geometry, num_layers), tags, dtype=DTYPE)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Load:
    """The most that is written at once.

    Attributes:
        batch: answers.
        num_paths: paths of each.
        prompt_tokens: tokens of a prompt.
        answer_tokens: tokens of an answer.
        length: positions of an answer; as many as tokens if all may stand one after the other.
    """

    batch: int
    num_paths: int
    prompt_tokens: int
    answer_tokens: int
    length: int | None = None


def plan_cache(geometry: str, device: torch.device, num_parameters: int, load: Load) -> int:
    """Return the size of the engine's cache in tokens: that of the answers, with some room if there is memory.

    Raises:
        ValueError: if the context is too short for an answer, or the memory that is free does not hold model, answers
            and what a pass needs besides.
    """
    config = make_config(geometry)
    tokens = load.prompt_tokens + load.answer_tokens
    length = load.answer_tokens if load.length is None else load.length
    if load.prompt_tokens + length > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {load.prompt_tokens} tokens and an answer of {length} take {load.prompt_tokens + length} "
            f"positions, and {geometry} has {config.max_position_embeddings}; have shorter answers written, or take "
            "another --geometry"
        )
    head_dim = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * DTYPE.itemsize * config.num_hidden_layers * config.num_key_value_heads * head_dim
    rows, needed = load.batch * load.num_paths, load.batch * tokens
    weights = DTYPE.itemsize * num_parameters
    logits = rows * config.vocab_size * (DTYPE.itemsize + 4 + 4)  # the model's, in float32, and the sampler's copy
    reading = load.batch * load.prompt_tokens * 3 * config.intermediate_size * DTYPE.itemsize
    # one layer's keys and values as each path sees them
    seen = (rows * load.prompt_tokens + load.batch * load.answer_tokens) * token_bytes // config.num_hidden_layers
    work = max(logits, reading, seen) + WORKSPACE
    free = free_memory(device)
    if free is None:
        return 2 * needed + SPARE_TOKENS
    left = free - weights - needed * token_bytes - work
    if left < 0:
        sizes = (weights + needed * token_bytes + work, weights, needed * token_bytes, work, free)
        total, model, cache, a_pass, there = (f"{size / 2**30:.1f}" for size in sizes)
        raise ValueError(
            f"{geometry} on {device} needs {total} GiB (weights {model}, a cache of {needed} tokens {cache}, a pass "
            f"{a_pass}) and {there} GiB are free; take a smaller --geometry, fewer or shorter answers, or another "
            "--device"
        )
    return needed + min(needed + SPARE_TOKENS, left // 2 // token_bytes)


def describe_model(geometry: str, model: PreTrainedModel, num_parameters: int) -> dict[str, Any]:
    """Return the description of the model for a result."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "geometry": geometry,
        "parameters": num_parameters,
        "dtype": dtype,
        "weights_packed": can_pack(model),
    }


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that tensors took on a GPU so far; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is measured, and where."""
    parser.add_argument(
        "--geometry",
        choices=list(GEOMETRIES),
        default="cpu-0.24b",
        help="size of the model, whose weights are random (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=read_device, default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU if there is one)"
    )


def read_device(text: str) -> torch.device:
    """Read an argument that names a device, and check that there is one."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    if kind == "cpu":
        return torch.device("cpu")
    number = int(index or 0)
    if number >= (found := torch.cuda.device_count()):
        raise argparse.ArgumentTypeError(
            f"{text} is not here: torch {torch.__version__} sees {found} CUDA devices; take one of them, or cpu"
        )
    return torch.device("cuda", number)
