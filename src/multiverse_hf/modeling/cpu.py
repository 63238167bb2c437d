"""What makes decoding fast on a CPU: weights in the order oneDNN reads them, and OpenMP's worker threads."""

import contextlib
import ctypes
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

MIN_PACKED = 1 << 16  # weights; smaller layers gain nothing


def has_bfloat16_kernels() -> bool:
    """Return whether oneDNN multiplies bfloat16 matrices on this CPU."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def free_cpu_memory() -> int | None:
    """Return the bytes of free memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


class PackedLinear:
    """The forward of a linear layer with a prepacked weight.

    Products of a few rows with a weight, which is what decoding is made of, take half the time then. Otherwise torch
    puts the weight in oneDNN's order at every call.

    Args:
        module: the layer, with a bfloat16 weight.
    """

    def __init__(self, module: torch.nn.Linear) -> None:
        self.module, self.mark = module, mark_of(module)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 16)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Multiply (..., inputs) to (..., outputs)."""
        module = self.module
        if torch.is_grad_enabled() or not inputs.numel() or inputs.dtype != torch.bfloat16:
            return torch.nn.functional.linear(inputs, module.weight, module.bias)  # another thread, not the engine
        # for two rows oneDNN (of torch 2.13, with AVX-512) reads a weight more slowly than for four
        is_pair = inputs.numel() == 2 * inputs.shape[-1]
        rows = torch.nn.functional.pad(inputs.reshape(2, -1), (0, 0, 0, 2)) if is_pair else inputs
        output = torch.ops.mkldnn._linear_pointwise(rows, self.weight, module.bias, "none", [], "")
        return output[:2].view(*inputs.shape[:-1], -1) if is_pair else output

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle as the layer's own forward."""
        return functools.partial, (torch.nn.Linear.forward, self.module)


def mark_of(module: torch.nn.Linear) -> tuple[int, int, int, int]:
    """Return what changes with a layer's weight: the parameter, its storage, its version counter, and its bits.

    The version counter misses what is written to ``weight.data``, as PEFT merges an adapter. So all bits are read, at
    the beginning of an answer: about the memory traffic of one decoding step.
    """
    weight = module.weight
    bits = weight.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
    words = bits[: len(bits) // 8 * 8].view(np.int64)
    return id(weight), weight.data_ptr(), weight._version, int(np.bitwise_xor.reduce(words))


_packed: "weakref.WeakKeyDictionary[torch.nn.Module, dict[torch.nn.Linear, PackedLinear]]" = (
    weakref.WeakKeyDictionary()
)


def packed_weights(model: Any) -> list[PackedLinear]:
    """Return the packed layers of a model, packing those that are new or have changed.

    The copies are kept as long as the model's backbone. A weight that was written to or replaced since, as by an
    optimizer, ``load_state_dict``, a cast or a merged adapter, is packed anew.

    Args:
        model: a causal LM.

    Returns:
        The layers; none where :func:`can_pack` is False.
    """
    if not can_pack(model):
        _packed.pop(model.base_model, None)
        return []
    old, kept = _packed.get(model.base_model, {}), {}
    try:
        for module in _packable(model):
            packed = old.get(module)
            kept[module] = packed if packed is not None and packed.mark == mark_of(module) else PackedLinear(module)
    except RuntimeError as err:  # of torch's operators on this CPU; answers are the same without, only slower
        logger.warning_once(f"the weights stay unpacked: {err}")
        kept = {}
    _packed[model.base_model] = kept
    return list(kept.values())


@contextlib.contextmanager
def using(packed: Sequence[PackedLinear]) -> Iterator[None]:
    """Have layers multiply with their packed weights."""
    try:
        for each in packed:
            each.module.forward = each
        yield
    finally:
        for each in packed:
            each.module.__dict__.pop("forward", None)


def can_pack(model: Any) -> bool:
    """Return whether bfloat16 weights can be packed here: a CPU with the instructions, and memory for a copy.

    The copy takes at most half of the memory that is free without it.
    """
    if model.device.type != "cpu" or model.dtype != torch.bfloat16 or not has_bfloat16_kernels():
        return False
    needed = sum(2 * module.weight.numel() for module in _packable(model))
    held = sum(2 * module.weight.numel() for module in _packed.get(model.base_model, {}))
    free = free_cpu_memory()
    return free is not None and 0 < 2 * needed < free + held


def _packable(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and type(module.weight) is torch.nn.Parameter  # not a part of one
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= MIN_PACKED
        and "forward" not in module.__dict__  # someone else has put theirs in
    ]


SOFT = 1  # omp_pause_soft: what is set stays set


@functools.cache
def _pause() -> Callable[[int], int] | None:
    try:  # found among the libraries that torch itself is linked to
        return ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (OSError, AttributeError):  # not built with OpenMP, or an older one
        return None


def release_workers() -> None:
    """Have OpenMP end the worker threads of the thread that calls, which get new ones when it next computes.

    GNU's OpenMP counts all threads of all pools. When there are more than cores, even idle ones, workers sleep between
    two operations and not for an instant, which makes decoding in a thread of its own slower.
    """
    if (pause := _pause()) is not None:
        pause(SOFT)
