"""Long branches on a CPU: each attends to copies of what it sees, not to its siblings' keys under a mask.

The log interleaves branches that are written at the same time. A step that met the whole log would multiply every
branch's queries with every branch's keys, only to mask most of the products: work that grows with the square of the
branches. So now and then what each branch sees is copied, a page for each, in the order in which the processor
multiplies fastest. A long beginning that all see is copied once; what came since is read from the log. Nothing hangs
on a copy: where there is none, or none that fits what a step sees, the log is masked. :class:`BranchCopies` owns them.

Shapes: H key heads, G query heads of each, D head_dim, Q queries; P pages of N log entries, C common ones, T in tails.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .cache import SCRATCH, LogCache
from .cpu import has_bfloat16_kernels
from .hooks import needs_eager
from .masks import SLIDING, layer_kinds
from .state import Reading

# Copies and tails have multiples of so many keys: rows of scores then lie at round addresses, and shapes are few, of
# which oneDNN compiles a product for each, which takes longer than to do it.
ROUND = 32
MAX_GATHERED = 1 << 16  # log entries that a layer gathers for all tails: what else is a bound of its memory
SHARE = 3  # beside the pool there is room for one copied entry in so many slots
# When what branches see is copied
MIN_WORK = 1 << 24  # multiplications that a layer's scores take; below, masking costs less
MIN_NEW = 256  # log entries written since it was last looked at,
MIN_TAIL = 64  # and so many by each branch


class Products:
    """Matrices that multiply rows of their own.

    In bfloat16 they are put in the order in which oneDNN reads them, once and not at every product, which is then
    bound by memory. Torch has no batched product that takes such an order, but a convolution in groups does: over an
    image one pixel high whose columns are the rows, and whose channels are the inputs of one matrix after the other.

    Args:
        matrices: (M, outputs, inputs).
        num_rows: rows that each will meet.
    """

    def __init__(self, matrices: torch.Tensor, num_rows: int) -> None:
        self.matrices, self.packed = matrices, None
        if matrices.dtype == torch.bfloat16 and matrices.device.type == "cpu" and has_bfloat16_kernels():
            count, outputs, inputs = matrices.shape
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(
                matrices.reshape(count * outputs, inputs, 1, 1),
                padding=[0, 0],
                stride=[1, 1],
                dilation=[1, 1],
                groups=count,
                input_size=[1, count * inputs, 1, num_rows],
            )
            self.matrices = None
            self.count = count

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply (rows, M, inputs) to (rows, M, outputs)."""
        if self.packed is None:
            return torch.bmm(rows.transpose(0, 1), self.matrices.mT).transpose(0, 1)
        image = rows.contiguous().view(1, 1, len(rows), -1).permute(0, 3, 1, 2)
        output = torch.ops.mkldnn._convolution_pointwise(
            image, self.packed, None, [0, 0], [1, 1], [1, 1], self.count, "none", [], ""
        )
        return output.permute(0, 2, 3, 1).view(len(rows), self.count, -1)


def can_copy(model: Any) -> bool:
    """Return whether long branches may read copies; a GPU reads keys no faster for meeting fewer queries."""
    is_full = SLIDING not in layer_kinds(model.config)
    is_packed = getattr(model, "_supports_attention_backend", False) and not needs_eager(model)
    return model.device.type == "cpu" and is_full and is_packed


def entries_beside_copies(entries: int) -> int:
    """Return how many log entries fit, with their copies, into the memory of so many entries."""
    return (SHARE * entries + SHARE - 1) // (SHARE + 1)


@dataclass(slots=True)
class CopiedLog:
    """What is copied of one log: its pages if there are any, and the log's length when it was last looked at."""

    pages: "Pages | None" = None
    length: int = 0


class BranchCopies:
    """The copies of all logs: decides what is copied and when, and keeps it within its memory.

    Args:
        model: a causal LM for which :func:`can_copy`.
        cache: the pool of logs.

    Attributes:
        min_scores: scores of live branches and log entries in a step, from which on copies may pay.
    """

    def __init__(self, model: Any, cache: LogCache) -> None:
        self.cache, self.device = cache, model.device
        # as many multiplications as the model is wide take the scores of a query and a key
        self.min_scores = MIN_WORK / model.config.hidden_size
        self.min_new, self.min_tail, self.min_page = MIN_NEW, MIN_TAIL, ROUND
        self.logs: dict[int, CopiedLog] = {}  # by the sequence's number
        cache.copies = self

    @property
    def num_entries(self) -> int:
        """Log entries held a second time."""
        return sum(log.pages.num_entries for log in list(self.logs.values()) if log.pages is not None)

    @property
    def max_entries(self) -> int:
        """Log entries that may be held a second time, all logs together."""
        return sys.maxsize if self.cache.growable else (self.cache.capacity - SCRATCH) // SHARE

    def release(self, owner: int) -> None:
        """Let the copies of a log go."""
        self.logs.pop(owner, None)

    def meet(self, reading: Reading, base: int) -> "Paged | None":
        """Return how a step's queries meet copies, after copying what is due; None if they meet the log.

        Args:
            reading: what is read, in a step with :attr:`min_scores` scores of a query and a key or more.
            base: where its log begins in the pool.
        """
        sequence = reading.sequence
        log = self.logs.setdefault(sequence.arrival, CopiedLog())
        end, views = sequence.num_computed, list({id(sees): sees for _, sees in sequence.pending}.values())
        # of all that have something to read: paths that just closed do not see what the branch after them does
        is_due = end - log.length >= max(self.min_new, self.min_tail * len(views), end // 16)
        if log.pages is not None and not is_due:
            owners = log.pages.owners(views)
            is_due = owners is None or 2 * owners.count(-1) > len(owners)  # most paths of the copies are closed
        if is_due:
            log.length, log.pages = end, None  # copies go before others are made: they are not held at once
            room = self.max_entries - self.num_entries
            log.pages = choose_pages(np.stack([each[:end] for each in views]), room, self.min_page)
        return None if log.pages is None else log.pages.meet(reading.entries, base, self.device)


@dataclass(frozen=True, slots=True, eq=False)
class Copies:
    """Products with keys and with values of one layer.

    Attributes:
        own: with pages, (P * H, N, D) and (P * H, D, N).
        common: with what all see, (H, C, D) and (H, D, C); None if there is nothing.
    """

    own: tuple[Products, Products]
    common: tuple[Products, Products] | None


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """The log entries of a sequence that were copied, of all before ``end`` that any branch saw.

    Attributes:
        entries: (P, N) int64, for each long branch the same number. Only who sees the page sees the last of it.
        common: (C,) int64, what all branches saw and is on no page.
        left: int64, what is neither on pages nor common. These are read from the log, as are those that came since.
        end: one past the last entry of any page.
        layers: the copies, by attention layer; each made when it is first met.
    """

    entries: np.ndarray
    common: np.ndarray
    left: np.ndarray
    end: int
    layers: dict[torch.nn.Module, Copies] = field(default_factory=dict)

    @property
    def num_entries(self) -> int:
        return self.entries.size + len(self.common)

    def owners(self, sees: list[np.ndarray]) -> list[int] | None:
        """Return which of several views each page belongs to.

        Args:
            sees: what is seen in each, (entries,) bool.

        Returns:
            For each page its only viewer, or -1; None if a page has several, a viewer has several pages, does not see
            all that is common, or sees something else from before ``end``.
        """
        on_pages = np.stack([each[self.entries[:, -1]] for each in sees])  # [view, page]
        if on_pages.sum(axis=0).max() > 1 or on_pages.sum(axis=1).max() > 1:
            return None
        sizes = on_pages.sum(axis=1) * self.entries.shape[1] + len(self.common)
        for each, size in zip(sees, sizes, strict=True):
            known = size + np.count_nonzero(each[self.left])
            if np.count_nonzero(each[: self.end]) != known or not each[self.common].all():
                return None
        return np.where(on_pages.any(axis=0), on_pages.argmax(axis=0), -1).tolist()

    def meet(self, entries: list[tuple[int, np.ndarray]], base: int, device: torch.device) -> "Paged | None":
        """Return how queries meet the pages in a step; None if the copies do not serve them.

        Args:
            entries: the log entry of each query, in order, with what it sees, (entries,) bool, up to itself.
            base: where the log begins in the pool.
            device: of the pool.
        """
        owners = self.owners([sees for _, sees in entries])
        if owners is None or max(owners) < 0:
            return None
        rest = np.concatenate([self.left, np.arange(self.end, entries[-1][0] + 1)])
        tails = []
        for entry, sees in entries:
            known = rest[: np.searchsorted(rest, entry, side="right")]
            tails.append(base + known[sees[known]])
        shape = len(tails), round_to_tile(max(map(len, tails)))
        if not is_worth_gathering(*shape, entries[-1][0] + 1):
            return None
        tail = np.full(shape, SCRATCH - 1)
        for row, slots in zip(tail, tails, strict=True):
            row[: len(slots)] = slots
        return Paged(self, owners, base, torch.from_numpy(tail).to(device))

    def copy(self, key: torch.Tensor, value: torch.Tensor, base: int, num_rows: int) -> Copies:
        """Copy a layer's keys and values.

        Args:
            key, value: (1, H, slots, D), the pool.
            base: where the log begins in it.
            num_rows: query heads of a key head.
        """

        def copied(entries: np.ndarray, rows: int) -> tuple[Products, Products]:
            slots = torch.from_numpy(base + entries.ravel()).to(key.device)
            keys, values = (  # page by page, of each head by head
                gather(states, slots).unflatten(1, entries.shape).transpose(0, 1).flatten(0, 1)
                for states in (key, value)
            )
            return Products(keys, rows), Products(values.mT, rows)

        common = copied(self.common[None], num_rows * len(self.entries)) if len(self.common) else None
        return Copies(copied(self.entries, num_rows), common)


def choose_pages(sees: np.ndarray, room: int, least: int = ROUND) -> Pages | None:
    """Choose what is copied of a log; None if it is nothing.

    Args:
        sees: (views, entries) bool, what each branch sees.
        room: the most entries that may be copied.
        least: of these the pages have a multiple.
    """
    counts = np.count_nonzero(sees, axis=0)
    if counts.min() == len(sees):  # nothing is hidden from anyone
        return None
    common = np.flatnonzero(counts == len(sees)) if len(sees) > 1 else np.empty(0, dtype=np.int64)
    owner = np.where(counts == 1, sees.argmax(axis=0), -1)
    own = [np.flatnonzero(owner == view) for view in range(len(sees))]
    # live branches have mostly forked together and are of one length; what they have beyond a page stays in the log
    lengths = sorted(len(entries) for entries in own)
    size = max(lengths, key=lambda size: size * sum(length >= size for length in lengths))
    chosen = [entries for entries in own if len(entries) >= max(size, 1)]
    if not chosen:
        return None
    # a short beginning costs less on every page than in products of its own
    is_on_pages = len(chosen) == len(own) and len(common) <= 2 * size
    if not is_on_pages:
        common = common[: len(common) // least * least]
        room -= len(common)
    extra = len(common) if is_on_pages else 0
    size = min(size + extra, room // len(chosen)) // least * least - extra
    if size <= 0:
        return None
    entries = np.stack([each[:size] for each in chosen])
    if is_on_pages:
        entries = np.concatenate([np.tile(common, (len(entries), 1)), entries], axis=1)
        common = common[:0]
    end = int(np.concatenate([entries.ravel(), common]).max()) + 1
    is_left = counts[:end] > 0
    is_left[entries] = is_left[common] = False
    since = sees[:, end:].sum(axis=1)
    longest = ((sees[:, :end] & is_left).sum(axis=1) + since).max()
    if not is_worth_gathering(len(sees), longest, sees.shape[1]):
        return None
    return Pages(entries, common, np.flatnonzero(is_left), end)


def is_worth_gathering(num_tails: int, longest: int, end: int) -> bool:
    """Return whether tails cost less than to mask a log of ``end`` entries; a gathered key costs some masked ones."""
    return longest <= max(end // 4, ROUND) and num_tails * longest <= MAX_GATHERED


def round_to_tile(count: int) -> int:
    """Return the first multiple of :data:`ROUND` that is no smaller."""
    return -(-count // ROUND) * ROUND


class Paged:
    """How the queries of a sequence meet pages in a step.

    Args:
        pages: what was copied.
        owners: of each page the one query that sees it, -1 if none does. A query has one page at most.
        base: where the log begins in the pool.
        tail: (Q, T) int64, the slots of what each query sees besides, and of the scratch slot after them.

    Attributes:
        is_tail: (Q, T) bool, which of these it sees.
    """

    def __init__(self, pages: Pages, owners: list[int], base: int, tail: torch.Tensor) -> None:
        self.pages, self.base = pages, base
        self.is_tail = (tail >= SCRATCH).numpy()
        self.num_queries, self.num_tail = tail.shape
        self.tail = tail.flatten()
        self.is_plain = owners == list(range(self.num_queries))  # each query has its page, as most of the time
        if not self.is_plain:
            met = [page for page, owner in enumerate(owners) if owner >= 0]
            self.query_of_page = torch.tensor([max(owner, 0) for owner in owners], device=tail.device)
            self.met_pages = torch.tensor(met, device=tail.device)
            self.their_queries = torch.tensor([owners[page] for page in met], device=tail.device)

    def by_page(self, rows: torch.Tensor) -> torch.Tensor:
        """From (G, Q, ...) to (G, P, ...); a page that nobody sees has the rows of any query."""
        return rows if self.is_plain else rows.index_select(1, self.query_of_page)

    def by_query(self, rows: torch.Tensor, fill: float) -> torch.Tensor:
        """From (G, P, ...) to (G, Q, ...), with ``fill`` for a query without a page."""
        if self.is_plain:
            return rows
        filled = rows.new_full((len(rows), self.num_queries, *rows.shape[2:]), fill)
        return filled.index_copy_(1, self.their_queries, rows.index_select(1, self.met_pages))


def gather(states: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Copy slots of a pool, (1, H, slots, D), to (H, S, D)."""
    gathered = states.new_empty(states.shape[1], len(slots), states.shape[3])
    for head, output in zip(states[0], gathered, strict=True):  # whose slots lie in a row
        torch.index_select(head, 0, slots, out=output)
    return gathered


def attend_paged(
    paged: Paged,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    """Attend with each query to its own page, to what is common, and to its tail.

    Precision is that of transformers' eager attention: products in the queries' dtype, softmax in float32.

    Args:
        paged: where things are.
        module: the attention layer.
        query: (1, H * G, Q, D).
        key, value: (1, H, slots, D), the pool; values may have another D.
        attention_mask: (1, 1, Q, T), added to the scores of tails.

    Returns:
        (1, Q, H * G, D).
    """
    _, heads, queries, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    copies = paged.pages.layers.get(module)
    if copies is None:
        copies = paged.pages.layers[module] = paged.pages.copy(key, value, paged.base, groups)
    (own_key, own_value), common = copies.own, copies.common
    scaled = query[0] * (head_dim**-0.5 if scaling is None else scaling)
    rows_GQHD = scaled.view(kv_heads, groups, queries, head_dim).permute(1, 2, 0, 3).contiguous()

    own = own_key(paged.by_page(rows_GQHD).view(groups, -1, head_dim))
    scores = [paged.by_query(own.view(groups, -1, kv_heads, own.shape[-1]), -torch.inf)]  # each (G, Q, H, keys)
    if common is not None:
        scores.append(common[0](rows_GQHD.view(-1, kv_heads, head_dim)).view(groups, queries, kv_heads, -1))
    tail_key, tail_value = (
        gather(states, paged.tail).view(-1, paged.num_tail, states.shape[-1]) for states in (key, value)
    )
    tail = torch.bmm(rows_GQHD.permute(2, 1, 0, 3).reshape(-1, groups, head_dim), tail_key.mT)  # (H * Q, G, T)
    tail = tail.view(kv_heads, queries, groups, -1).add_(attention_mask[0, 0, :, None])
    scores.append(tail.permute(2, 1, 0, 3))
    weights = torch.cat(scores, dim=-1).softmax(dim=-1)  # float32 inside
    own, *commons, tail = weights.split([each.shape[-1] for each in scores], dim=-1)

    own = own_value(paged.by_page(own).reshape(groups, -1, own.shape[-1]))
    output = paged.by_query(own.view(groups, -1, kv_heads, own.shape[-1]), 0)
    for each in commons:
        rows = each.reshape(groups * queries, kv_heads, -1)
        output = output + common[1](rows).view(groups, queries, kv_heads, -1)
    tail = torch.bmm(tail.permute(2, 1, 0, 3).reshape(-1, groups, tail.shape[-1]), tail_value)
    output = output.permute(1, 2, 0, 3) + tail.view(kv_heads, queries, groups, -1).transpose(0, 1)
    return output.reshape(1, queries, heads, -1)
