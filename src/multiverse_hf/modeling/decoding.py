"""How a step attends, and what makes its matrix products cheap.

A step's queries are packed: those of all sequences in one row, without padding, so that every linear layer runs once
over what there is. Only attention has to know which queries belong together, and what part of the pool of keys is
theirs: :func:`packed_attention` takes the row apart, lets an attention function of transformers do each piece, and
puts the row together again.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .pages import Paged, attend_paged, has_bfloat16_kernels
from .static import StaticStep, attend_static

# The name under which transformers finds packed_attention. A process may hold several copies of this code, which came
# with checkpoints, and each must find its own.
PACKED = f"multiverse_packed_{zlib.crc32(__name__.encode()):08x}"
FOLD_QUERIES = 512  # folded queries; above, as in a prompt, the copies that folding avoids are cheap


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries that attend to the same slots.

    Attributes:
        queries: their place in the packed row.
        keys: the slots they may see, a slice of the pool.
        mask: columns of the step's mask that stand for these slots, or for those of ``paged``; None if all queries see
            all of them.
        causal: the slots are a plain text so far and the queries its end; no mask is needed.
        paged: copies of what the queries see, and the slots that they see besides; None if there are none.
    """

    queries: slice
    keys: slice
    mask: slice | None
    causal: bool = False
    paged: Paged | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What :func:`packed_attention` has to know about a step.

    Attributes:
        pieces: in the order of their queries, which they cover.
        attend: an attention function as transformers registers them.
        folded: masks in the shape the kernel wants, by piece and mask: made in the first layer, used in all. By the
            mask itself, not its id: each layer on another device has a copy, and a new one may get the id of the last.
    """

    pieces: list[Piece]
    attend: Callable[..., tuple[torch.Tensor, Any]]
    folded: dict[tuple[int, torch.Tensor | None], torch.Tensor] = field(default_factory=dict)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    multiverse_step: Step | StaticStep | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend piece by piece.

    Args:
        module: the attention layer.
        query: (1, heads, Q, head_dim), the queries of all sequences.
        key, value: (1, kv_heads, slots, head_dim), the pool.
        attention_mask: (1, 1, Q, K) in the queries' dtype, added to the scores: what a query sees of its own piece.
        multiverse_step: where the pieces are.

    Returns:
        (1, Q, heads, head_dim), and no weights.
    """
    if isinstance(multiverse_step, StaticStep):
        return attend_static(multiverse_step, query, key, value, kwargs.get("scaling")), None
    if multiverse_step is None:  # not the engine's own pass: a layer that is computed again for its gradient
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    outputs = []
    step = multiverse_step
    for number, piece in enumerate(step.pieces):
        mask = None if piece.mask is None else attention_mask[:, :, piece.queries, piece.mask]
        if piece.paged is not None:
            rows = query[:, :, piece.queries]
            outputs.append(attend_paged(piece.paged, module, rows, key, value, mask, kwargs.get("scaling")))
            continue
        keys, values = key[:, :, piece.keys], value[:, :, piece.keys]
        kwargs |= {"causal": piece.causal, "folded": (step.folded, (number, attention_mask))}
        output, _ = step.attend(module, query[:, :, piece.queries], keys, values, mask, *args, **kwargs)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def attend_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    causal: bool = False,
    folded: tuple[dict[Any, torch.Tensor], Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with torch's kernel; with few queries, without a copy of keys and values for every query head.

    The query heads that share a key head are then folded into the query dimension instead; the result is the same.

    Args:
        query: (1, heads, Q, head_dim).
        key, value: (1, kv_heads, K, head_dim).
        attention_mask: (1, 1, Q, K), zero where a query attends to a key and minus infinity elsewhere.
        causal: the queries are the last Q of K tokens in a row; ``attention_mask`` is None.
        folded: where masks are kept for the layers to come, and under what key.

    Returns:
        (1, Q, heads, head_dim), and no weights.
    """
    _, heads, queries, _ = query.shape
    groups = heads // key.shape[1]
    begins = causal and queries == key.shape[2]  # the one causal mask all of torch's kernels agree on
    if causal and not begins and queries > 1:
        attention_mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril_(key.shape[2] - queries)[None, None]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    if groups * queries > FOLD_QUERIES or groups == 1:
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        output = sdpa(query, key, value, attention_mask, is_causal=begins and queries > 1, scale=scaling)
        return output.transpose(1, 2), None
    if begins and queries > 1:
        attention_mask = torch.ones(1, 1, queries, queries, dtype=torch.bool, device=query.device).tril_()
    mask = None
    if attention_mask is not None:
        store, name = folded if folded is not None else ({}, None)
        mask = store.get(name)
        if mask is None:
            mask = store[name] = attention_mask.repeat(1, 1, groups, 1)
    query = query.reshape(1, key.shape[1], groups * queries, query.shape[-1])
    output = sdpa(query, key, value, mask, scale=scaling)
    return output.reshape(1, heads, queries, -1).transpose(1, 2), None


def attend_eager(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    causal: bool = False,
    folded: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attend as the model's own file does it: whatever it does besides, such as soft capping, is done here too."""
    if causal:
        queries, keys = query.shape[2], key.shape[2]
        hidden = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu_(keys - queries + 1)
        attention_mask = torch.zeros(1, 1, queries, keys, dtype=query.dtype, device=query.device)
        attention_mask.masked_fill_(hidden, torch.finfo(query.dtype).min)
    own = sys.modules[type(module).__module__].eager_attention_forward
    return own(module, query, key, value, attention_mask, *args, **kwargs)


AttentionInterface.register(PACKED, packed_attention)
# The engine always brings a mask of its own; the entry only says that the implementation takes the masks of sdpa.
AttentionMaskInterface.register(PACKED, sdpa_mask)


# Taking turns

# The attention implementation is a setting of the model. An engine changes it for a pass, so it and whoever else calls
# the model take turns: the backbone's hooks hold this lock during every pass.
TURN = threading.RLock()


def take_turn(*_: Any) -> None:
    """Forward pre-hook of a backbone."""
    if not torch.compiler.is_compiling():
        TURN.acquire()


def end_turn(*_: Any) -> None:
    """Forward hook of a backbone, called whatever happens."""
    if not torch.compiler.is_compiling():
        TURN.release()


# Packed weights

MIN_PACKED = 1 << 16  # weights; smaller layers gain nothing


class PackedForward:
    """Forward of a linear layer with a packed weight. A copy of the layer has a plain one."""

    def __init__(self, module: torch.nn.Linear) -> None:
        self.module = module
        self.weight = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), 16)

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        module = self.module
        if torch.is_grad_enabled() or not inputs.numel() or inputs.dtype != torch.bfloat16:
            return torch.nn.functional.linear(inputs, module.weight, module.bias)  # a caller who is not the engine
        if inputs.numel() != 2 * inputs.shape[-1]:
            return self._multiply(inputs)
        # for two rows oneDNN (of torch 2.13, with AVX-512) reads a weight more slowly than for four
        rows = torch.nn.functional.pad(inputs.reshape(2, -1), (0, 0, 0, 2))
        return self._multiply(rows)[:2].view(*inputs.shape[:-1], -1)

    def _multiply(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.module.bias, "none", [], "")

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (torch.nn.Linear.forward, self.module)


def can_pack(model: torch.nn.Module) -> bool:
    """Say whether bfloat16 weights can be packed here: a CPU with the instructions, and memory for a copy."""
    if model.device.type != "cpu" or model.dtype != torch.bfloat16:
        return False
    if not has_bfloat16_kernels():
        return False
    needed = sum(2 * module.weight.numel() for module in _packable(model))
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not told on this system
        return False
    return 0 < 2 * needed < free


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


@contextlib.contextmanager
def packed_weights(model: torch.nn.Module) -> Iterator[None]:
    """Keep a copy of bfloat16 weights in the order in which oneDNN reads them, as torch's own compiler does.

    Products of a few rows with a weight, which is what decoding is made of, then take half the time on a CPU: torch
    would otherwise put the weight in order at every call. The weights must not change inside the context.
    """
    modules = _packable(model)
    try:
        for module in modules:
            module.forward = PackedForward(module)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


# Threads

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
