"""The static path: decoding steps of few fixed shapes, so that a GPU replays each as one captured graph.

Small steps on a GPU are bound by the host that launches their kernels. A captured graph is launched at once, but its
shapes and addresses are fixed. So the queries of a step are padded to a power of two, with padding that writes to the
scratch slot, and attention is one call of flex_attention for all sequences: each is a row of a batch over the one pool
of keys, which a block mask points to where its log lies.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.utils import logging

from .attention_packed import PackedRunner
from .cache import LogCache
from .forward_inputs import CACHE
from .state import Reading

logger = logging.get_logger(__name__)

BLOCK = 128  # keys that a block of the mask stands for
MIN_WIDTH = 16  # queries of one sequence: fewer shapes; flex_attention computes 16 rows of a key head in any case
# Queries of one key head that flex_attention's kernel for few queries takes; for more, no kernel is found before
# https://github.com/pytorch/pytorch/pull/185349 (torch 2.13 lacks it)
MAX_ROWS = 128
MAX_VISIBLE = 1 << 26  # bytes; a step that needs more, such as 1024 branches of 64k log entries, is read packed

MAX_SHAPES = 256  # kernels to compile; torch's own limit of 8 is for code that is compiled again by mistake


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        # torch counts kernels by the function that is compiled: these are not to use up what training may compile
        return flex_attention(*args, **kwargs)

    # fullgraph: an error at the limit, where torch would otherwise go on with scores of the whole pool
    return torch.compile(attend, dynamic=False, fullgraph=True)


def round_up(count: int, least: int = 1) -> int:
    """Return the first of ``least``, ``2 * least``, ``4 * least``, ... that is no smaller than ``count``."""
    size = least
    while size < count:
        size *= 2
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

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Attend all sequences in one call.

        Args:
            query: (1, heads, Q, head_dim).
            key, value: (1, kv_heads, slots, head_dim), the pool.

        Returns:
            (1, Q, heads, head_dim).
        """
        kv_heads, num_seqs = key.shape[1], self.block_mask.kv_num_blocks.shape[0]
        rows = query[0].index_select(1, self.places).unflatten(1, (num_seqs, -1)).unflatten(0, (kv_heads, -1))
        # torch's kernel for few queries takes a power of two of query heads for each key head; the other one, made for
        # prompts, does not share a long log out among the GPU's processors
        groups = rows.shape[1]
        if spare := round_up(groups) - groups:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, 0, 0, spare))
        is_wide = rows.shape[1] * rows.shape[3] > MAX_ROWS
        attend = _compiled() if query.is_cuda else flex_attention
        output = attend(
            rows.flatten(0, 1).transpose(0, 1),
            key,
            value,
            block_mask=self.block_mask,
            scale=scaling,
            enable_gqa=True,
            kernel_options={"FORCE_USE_FLEX_ATTENTION": True} if is_wide else None,
        )
        output = output.unflatten(1, (kv_heads, -1))[:, :, :groups].flatten(1, 2)
        return output.transpose(1, 2).flatten(0, 1).index_select(0, self.queries)[None]


class Visible:
    """What the queries of a step see, at one address for all shapes.

    Attributes:
        host, device: (size,) bool: for each query of the packed row as many log entries as the longest log has.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.host = torch.zeros(size, dtype=torch.bool, pin_memory=device.type == "cuda")
        self.device = self.host.to(device)

    @property
    def size(self) -> int:
        return len(self.host)

    def fill(self, batch: list[Reading], longest: int) -> None:
        """Write a step, in one copy to the device: what is copied lies together."""
        count = batch[-1].queries.stop * longest
        rows = self.host[:count].view(-1, longest).numpy()
        for reading in batch:
            for row, (entry, sees) in enumerate(reading.entries, reading.queries.start):
                rows[row, : entry + 1] = sees[: entry + 1]
                rows[row, entry + 1 : reading.end] = False
        self.device[:count].copy_(self.host[:count], non_blocking=True)


class StaticShape:
    """Steps of one shape: their inputs at fixed addresses, and on a GPU the graph that reads them.

    Args:
        model: the model; its attention is already that of the engine.
        cache: the pool, whose tensors must stay where they are.
        shape: (Q, S, W): queries, sequences, and queries of one sequence.
        visible: what the queries see.
        pool, stream: of CUDA graphs, shared by all shapes.
    """

    def __init__(
        self, model: Any, cache: LogCache, shape: tuple[int, int, int], visible: Visible, pool: Any, stream: Any
    ) -> None:
        self.model, self.cache, self.shape, self.visible = model, cache, shape, visible
        self.pool, self.stream = pool, stream
        num_queries, num_seqs, width = shape
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
            "longest": 1,
        }
        # one copy to the device for all numbers, one for what is visible
        self.host = torch.zeros(sum(sizes.values()), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.numbers = self.host.to(device)
        self.given = dict(zip(sizes, (part.numpy() for part in self.host.split(list(sizes.values()))), strict=True))
        self.inputs = dict(zip(sizes, self.numbers.split(list(sizes.values())), strict=True))
        self.graph: Any = None
        self.logits: torch.Tensor | None = None

    def __call__(self, batch: list[Reading]) -> torch.Tensor:
        """Read log entries; as :class:`~.attention_packed.PackedRunner`."""
        is_cuda = self.model.device.type == "cuda"
        if is_cuda:
            torch.cuda.current_stream().synchronize()  # the last step has read the host's side
        num_rows = self._fill(batch)
        self.numbers.copy_(self.host, non_blocking=True)
        if not is_cuda:
            return self._forward()[:num_rows]
        if self.graph is None:
            self._capture()
        self.graph.replay()
        return self.logits[:num_rows]

    def _fill(self, batch: list[Reading]) -> int:
        """Write a step to the inputs; give its rows of logits."""
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
            shift = queries.start - reading.first
            for entry in reading.rows:
                given["rows"][num_rows] = entry + shift
                num_rows += 1
        given["longest"][:] = longest = max(reading.end for reading in batch)
        self.visible.fill(batch, longest)
        return num_rows

    def _forward(self) -> torch.Tensor:
        inputs, (_, _, width) = self.inputs, self.shape
        base, used, places, longest = inputs["base"], inputs["length"], inputs["places"], inputs["longest"]
        visible, most = self.visible.device, self.visible.size - 1

        def sees(seq: Any, _head: Any, query: Any, slot: Any) -> Any:
            entry = slot - base[seq]
            at = places[seq * width + query] * longest[0] + entry
            return (entry >= 0) & (entry < used[seq]) & visible[at.clamp(0, most)]

        first = base // BLOCK
        num_blocks = torch.where(used > 0, (base + used - 1) // BLOCK + 1 - first, 0)
        # as many columns as the pool has blocks, which flex_attention wants; those after num_blocks are not looked at
        last = (self.cache.capacity - 1) // BLOCK
        blocks = (first[:, None] + torch.arange(last + 1, device=base.device)).clamp(max=last)
        mask = BlockMask.from_kv_blocks(
            num_blocks.int()[:, None, None],
            blocks.int()[:, None, None],
            BLOCK_SIZE=(max(width, BLOCK), BLOCK),  # all queries of a sequence are one row of blocks
            mask_mod=sees,
            seq_lengths=(width, self.cache.capacity),
            compute_q_blocks=False,
        )
        self.cache.write, self.cache.read = inputs["slots"], slice(0, self.cache.capacity)
        output = self.model(
            input_ids=inputs["ids"][None],
            position_ids=inputs["positions"][None],
            attention_mask=torch.zeros(1, 1, 1, 1, dtype=self.model.dtype, device=base.device),  # the model makes none
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=inputs["rows"],
            multiverse_step=StaticStep(inputs["places"], inputs["queries"], mask),
        )
        return output.logits[0]

    def _capture(self) -> None:
        """Record the forward pass; a step that is read twice writes the same keys to the same slots."""
        own = torch.cuda.current_stream()
        self.stream.wait_stream(own)
        # torch.cuda.graph leaves its stream in place where a capture fails; this puts the thread's own back
        with torch.cuda.stream(own):
            with torch.cuda.stream(self.stream), torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
                for _ in range(2):  # what compiles or allocates on first use must have done so
                    self._forward()
            own.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            # a stream of the model's device: torch's own for captures is of the device that captured first
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                self.logits = self._forward()
        self.graph = graph


def can_capture(model: Any) -> bool:
    """Return whether a graph can hold a model's pass: nothing in it is decided on the host.

    Rotary embeddings of these kinds look at the greatest position to choose their frequencies. For longrope, which
    Phi has, the host no longer does so in transformers 5.23, but it does in 5.17.
    """
    kinds: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)  # or a dict of them, by kind of layer
        kinds |= set(kind.values()) if isinstance(kind, dict) else {kind}
    return not any(kind == "longrope" or "dynamic" in kind for kind in kinds if isinstance(kind, str))


class StaticRunner(PackedRunner):
    """Reads decoding steps in static shapes, each made when it is first met; reads all other steps packed."""

    name = "static"

    def __init__(self, model: Any, cache: LogCache) -> None:
        super().__init__(model, cache)
        self.shapes: dict[tuple[int, int, int], StaticShape] = {}
        self.visible: Visible | None = None
        self.max_visible = min(MAX_VISIBLE, 1024 * cache.capacity)
        is_cuda = model.device.type == "cuda"
        self.context = torch.cuda.device(model.device) if is_cuda else contextlib.nullcontext()
        self.pool = torch.cuda.graph_pool_handle() if is_cuda else None
        self.stream = torch.cuda.Stream(model.device) if is_cuda else None

    def fits(self, batch: list[Reading]) -> bool:
        """Return whether a step is one of decoding: no prompt in it, and no sequence with more queries than usual."""
        longest = max(reading.end for reading in batch)
        return (
            not self.cache.growable
            and batch[-1].queries.stop * longest <= self.max_visible
            and all(
                not reading.sequence.is_reading
                and len(reading.entries) <= max(MIN_WIDTH, round_up(len(reading.sequence.live)))
                for reading in batch
            )
        )

    def read(self, batch: list[Reading]) -> torch.Tensor:
        """Do what :class:`~.attention_packed.PackedRunner` does."""
        if self.name == "static" and self.fits(batch):
            try:
                return self.read_static(batch)
            # kernels that cannot be made here, no memory for another graph; torch's compiler raises errors of many
            # classes, the one at its limit of shapes is a plain Exception
            except Exception as err:
                if self.device.type != "cuda":
                    raise
                logger.warning(f"static decoding fails on this device, packed decoding goes on: {err}")
                self.name = "packed"
                self.shapes.clear()
        return super().read(batch)

    def read_static(self, batch: list[Reading]) -> torch.Tensor:
        """Read a batch that :meth:`fits`."""
        shape = (
            round_up(batch[-1].queries.stop),
            round_up(len(batch)),
            round_up(max(len(reading.entries) for reading in batch), MIN_WIDTH),
        )
        with self.context:  # graphs are of the thread's current device, and an engine has a thread of its own
            if self.visible is None:
                self.visible = Visible(self.max_visible, self.model.device)
            if shape not in self.shapes:
                self.shapes[shape] = StaticShape(self.model, self.cache, shape, self.visible, self.pool, self.stream)
            return self.shapes[shape](batch)

    def free(self) -> None:
        """Free the memory of the cache and of the graphs, which know the cache by its address."""
        super().free()
        self.shapes.clear()
        self.visible = None
