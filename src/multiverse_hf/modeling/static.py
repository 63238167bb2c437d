"""The static path: decoding steps of few fixed shapes, so that a GPU replays each as one captured graph.

Small steps on a GPU are bound by the host that launches their kernels. A captured graph is launched at once, but its
shapes and addresses are fixed. So the queries of a step are padded to a power of two, with padding that writes to the
scratch slot, and attention is one call of flex_attention for all sequences: each is a row of a batch over the one pool
of keys, which a block mask points to where its log lies.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .cache import LogCache

if TYPE_CHECKING:
    from .runner import Reading

BLOCK = 128  # keys that a block of the mask stands for
MIN_WIDTH = 16  # queries of one sequence; flex_attention computes so many in any case
MIN_LENGTH = 2 * BLOCK


MAX_SHAPES = 256  # kernels to compile; torch's own limit of 8 is for code that is compiled again by mistake


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    # fullgraph: an error at the limit, where torch would otherwise go on with scores of the whole pool
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def round_up(count: int, least: int = 1, factor: int = 2) -> int:
    """Give the first of ``least``, ``least * factor``, ... that is no smaller than ``count``."""
    size = least
    while size < count:
        size *= factor
    return size


@dataclass(frozen=True, slots=True)
class StaticStep:
    """What attention has to know about a static step; S sequences of up to W queries each.

    Attributes:
        places: (S * W,) int64, which query of the packed row is at each place; padding is any.
        queries: (Q,) int64, the place of each query of the packed row.
        block_mask: what each place sees of the pool.
    """

    places: torch.Tensor
    queries: torch.Tensor
    block_mask: BlockMask


def attend_static(
    step: StaticStep, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Attend all sequences in one call.

    Args:
        query: (1, heads, Q, head_dim).
        key, value: (1, kv_heads, slots, head_dim), the pool.

    Returns:
        (1, Q, heads, head_dim).
    """
    _, heads, _, head_dim = query.shape
    num_seqs = step.block_mask.kv_num_blocks.shape[0]
    rows = query[0].index_select(1, step.places).view(heads, num_seqs, -1, head_dim).transpose(0, 1)
    attend = _compiled() if query.is_cuda else flex_attention
    output = attend(rows, key, value, block_mask=step.block_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, step.queries)[None]


class StaticShape:
    """Steps of one shape: their inputs at fixed addresses, and on a GPU the graph that reads them.

    Args:
        model: the model; its attention is already that of the engine.
        cache: the pool, whose tensors must stay where they are.
        shape: (Q, S, W, L): queries, sequences, queries of one sequence, and log entries of one sequence.
        pool: of CUDA graphs' memory, shared by all shapes.
    """

    def __init__(self, model: Any, cache: LogCache, shape: tuple[int, int, int, int], pool: Any) -> None:
        self.model, self.cache, self.shape, self.pool = model, cache, shape, pool
        num_queries, num_seqs, width, length = shape
        device = model.device
        sizes = {
            "ids": num_queries,
            "positions": num_queries,
            "slots": num_queries,
            "rows": num_queries,
            "queries": num_queries,
            "places": num_seqs * width,
            "base": num_seqs,
            "length": num_seqs,
        }
        is_cuda = device.type == "cuda"
        # one copy to the device for all numbers, one for what is visible
        self.host = torch.zeros(sum(sizes.values()), dtype=torch.int64, pin_memory=is_cuda)
        self.host_visible = torch.zeros(num_seqs, width, length, dtype=torch.bool, pin_memory=is_cuda)
        self.numbers = self.host.to(device)
        self.visible = self.host_visible.to(device)
        self.given = dict(zip(sizes, (part.numpy() for part in self.host.split(list(sizes.values()))), strict=True))
        self.inputs = dict(zip(sizes, self.numbers.split(list(sizes.values())), strict=True))
        self.graph: Any = None
        self.logits: torch.Tensor | None = None

    def __call__(self, batch: "list[Reading]") -> torch.Tensor:
        """Read log entries; as :class:`~.runner.ModelRunner`."""
        if self.graph is not None:
            torch.cuda.current_stream().synchronize()  # the last step has read the host's side
        num_rows, longest = self._fill(batch)
        self.numbers.copy_(self.host, non_blocking=True)
        self.visible[..., :longest].copy_(self.host_visible[..., :longest], non_blocking=True)
        if self.model.device.type != "cuda":
            return self._forward()[:num_rows]
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.logits[:num_rows]

    def _fill(self, batch: "list[Reading]") -> tuple[int, int]:
        """Write a step to the host's side of the inputs; give its rows of logits and the length of its longest log."""
        self.host.zero_()  # padding reads token 0 at position 0 and writes to the scratch slot
        given, width, num_rows = self.given, self.shape[2], 0
        for number, reading in enumerate(batch):
            sequence, queries = reading.sequence, reading.queries
            base = self.cache.extents[sequence.arrival].base
            given["ids"][queries] = sequence.ids[reading.first : reading.end]
            given["positions"][queries] = sequence.positions[reading.first : reading.end]
            given["slots"][queries] = np.arange(base + reading.first, base + reading.end)
            place = number * width
            given["queries"][queries] = np.arange(place, place + len(reading.entries))
            given["places"][place : place + len(reading.entries)] = np.arange(queries.start, queries.stop)
            given["base"][number], given["length"][number] = base, reading.end
            visible = self.host_visible[number].numpy()
            for row, (entry, sees) in enumerate(reading.entries):
                visible[row, : entry + 1] = sees[: entry + 1]
                visible[row, entry + 1 : reading.end] = False
            shift = queries.start - reading.first
            for branch in sequence.live:
                given["rows"][num_rows] = branch.segment.entries[-1] + shift
                num_rows += 1
        return num_rows, max(reading.end for reading in batch)

    def _forward(self) -> torch.Tensor:
        inputs, (_, _, width, length) = self.inputs, self.shape
        base, used, visible = inputs["base"], inputs["length"], self.visible

        def sees(seq: Any, _head: Any, query: Any, slot: Any) -> Any:
            entry = slot - base[seq]
            return (entry >= 0) & (entry < used[seq]) & visible[seq, query, entry.clamp(0, length - 1)]

        first = base // BLOCK
        num_blocks = torch.where(used > 0, (base + used - 1) // BLOCK + 1 - first, 0)
        # as many columns as the pool has blocks, which flex_attention wants; those after num_blocks are not looked at
        last = (self.cache.capacity - 1) // BLOCK
        blocks = (first[:, None] + torch.arange(last + 1, device=base.device)).clamp(max=last)
        mask = BlockMask.from_kv_blocks(
            num_blocks.int()[:, None, None],
            blocks.int()[:, None, None],
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(width, self.cache.capacity),
            compute_q_blocks=False,
        )
        self.cache.write, self.cache.read = inputs["slots"], slice(0, self.cache.capacity)
        output = self.model(
            input_ids=inputs["ids"][None],
            position_ids=inputs["positions"][None],
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=base.device),  # the model makes none
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=inputs["rows"],
            multiverse_step=StaticStep(inputs["places"], inputs["queries"], mask),
        )
        return output.logits[0]

    def _capture(self) -> None:
        """Record the forward pass; a step that is read twice writes the same keys to the same slots."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            for _ in range(2):  # what compiles or allocates on first use must have done so
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            self.logits = self._forward()
        self.graph = graph


class StaticRunner:
    """Reads decoding steps in static shapes, each made when it is first met."""

    def __init__(self, model: Any, cache: LogCache) -> None:
        self.model, self.cache = model, cache
        self.shapes: dict[tuple[int, int, int, int], StaticShape] = {}
        self.pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def fits(self, batch: "list[Reading]") -> bool:
        """Say whether a step is one of decoding: no prompt in it, and no more queries of a sequence than is usual."""
        return not self.cache.growable and all(
            not reading.sequence.is_reading
            and len(reading.entries) <= max(MIN_WIDTH, round_up(len(reading.sequence.live)))
            for reading in batch
        )

    def __call__(self, batch: "list[Reading]") -> torch.Tensor:
        """Read log entries; as :class:`~.runner.ModelRunner`, for a batch that :meth:`fits`."""
        shape = (
            round_up(batch[-1].queries.stop),
            round_up(len(batch)),
            round_up(max(len(reading.entries) for reading in batch), MIN_WIDTH),
            round_up(max(reading.end for reading in batch), MIN_LENGTH, 4),
        )
        if shape not in self.shapes:
            self.shapes[shape] = StaticShape(self.model, self.cache, shape, self.pool)
        return self.shapes[shape](batch)
