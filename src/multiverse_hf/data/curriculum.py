"""The rows of an epoch: their forms, their order and their packing.

Training moves from all-sequential to all-parallel over its epochs (Multiverse, section on training). Each epoch reads
every record once, a share of the records in parallel form and the rest in sequential form. The rows of an epoch depend
only on the seed and the epoch's number, so they are the same in every process and after a restart.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

PAPER_SHARES = (0.0, 0.0, 0.1, 0.5, 0.5, 0.9, 1.0, 1.0)  # eight passes, Multiverse-32B
_WINDOW = 4096  # rows that are packed together; more would cost time and pack no better


def paper_shares(num_epochs: int) -> list[float]:
    """Return the paper's shares of rows in parallel form, interpolated to another number of epochs.

    The shares are read at evenly spaced points from the first pass to the last, with straight lines between passes. A
    single epoch is all parallel.

    Raises:
        ValueError: if there is no epoch.
    """
    if num_epochs < 1:
        raise ValueError(f"a curriculum needs at least one epoch, got {num_epochs}")
    last = len(PAPER_SHARES) - 1
    points = np.linspace(0, last, num_epochs) if num_epochs > 1 else [last]
    return [round(float(share), 4) for share in np.interp(points, range(last + 1), PAPER_SHARES)]


@dataclass(frozen=True, slots=True)
class Choice:
    """The rows of one record: the indices of its forms in the dataset, and their lengths in tokens.

    A record with one form has it in both fields.
    """

    parallel: int
    sequential: int
    parallel_length: int
    sequential_length: int

    @property
    def is_fixed(self) -> bool:
        """Whether the record has only one form."""
        return self.parallel == self.sequential


class CurriculumSampler(Sampler[tuple[int, ...]]):
    """Yields the rows of an epoch, each as a tuple of dataset indices: one index, or all rows packed into one.

    Args:
        choices: the records.
        shares: share of records in parallel form by epoch, 0 to 1. Later epochs use the last share.
        seed: seed of every random choice here.
        shuffle: read the records in random order.
        max_length: most tokens of a packed row; None for no packing. A longer row stays alone.
        group: without packing, number of batches within which rows are ordered by length, so that less is padded.
        batch_size: rows per batch, for ``group``.
        num_epochs: epochs that must have the same number of packed rows, as a trainer counts its steps beforehand.
        step: packed rows that all processes together read for an update. Packs are split until the last update is
            full, if there are enough documents. Otherwise processes read the first packs of the epoch again.

    Raises:
        ValueError: if there is no record, or a share is out of range.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        shares: Sequence[float] = (1.0,),
        seed: int = 0,
        shuffle: bool = True,
        max_length: int | None = None,
        group: int = 0,
        batch_size: int = 1,
        num_epochs: int = 1,
        step: int = 1,
    ) -> None:
        if not choices:
            raise ValueError("there is no row to train on")
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"parallel_share is a share from 0 to 1 for each epoch, got {list(shares)}")
        self.choices, self.shares, self.seed, self.shuffle = choices, tuple(shares), seed, shuffle
        self.max_length, self.group, self.batch_size = max_length, group, batch_size
        self.epoch = 0
        self.length = len(choices)
        if max_length is not None:
            most = max(len(self._packs(epoch)) for epoch in range(max(1, num_epochs)))
            self.length = min(-(-most // step) * step, len(choices))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read next; accelerate calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.plan(self.epoch))

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        """Return an epoch's rows, in order."""
        if self.max_length is not None:
            packs = self._packs(epoch)
            while len(packs) < self.length:  # another epoch has more rows: split the fullest pack
                most = max(range(len(packs)), key=lambda index: len(packs[index]))
                pack = packs[most]
                packs[most : most + 1] = [pack[: len(pack) // 2], pack[len(pack) // 2 :]]
            return packs
        rows = self._rows(epoch)
        if self.group:
            rows = group_by_length(rows, self.batch_size, self.group, self._generator(epoch, 2))
        return [(row,) for row, _ in rows]

    def parallel_share(self, epoch: int) -> float:
        """Return the drawn share of an epoch's rows in parallel form; records of one form do not count."""
        free = [index for index, choice in enumerate(self.choices) if not choice.is_fixed]
        return len(self._parallel(epoch)) / len(free) if free else self._share(epoch)

    def _share(self, epoch: int) -> float:
        return self.shares[min(epoch, len(self.shares) - 1)]

    def _generator(self, epoch: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(((self.seed * 1_000_003 + epoch) * 4 + use) % (1 << 63))

    def _parallel(self, epoch: int) -> set[int]:
        """Return the records to read in parallel form: exactly the share, to the nearest record."""
        free = [index for index, choice in enumerate(self.choices) if not choice.is_fixed]
        count = round(self._share(epoch) * len(free))
        drawn = torch.randperm(len(free), generator=self._generator(epoch, 0))[:count].tolist()
        return {free[index] for index in drawn}

    def _rows(self, epoch: int) -> list[tuple[int, int]]:
        """Return index and length of an epoch's rows."""
        parallel = self._parallel(epoch)
        order: Sequence[int] = range(len(self.choices))
        if self.shuffle:
            order = torch.randperm(len(self.choices), generator=self._generator(epoch, 1)).tolist()
        rows = []
        for index in order:
            choice = self.choices[index]
            if choice.is_fixed or index in parallel:
                rows.append((choice.parallel, choice.parallel_length))
            else:
                rows.append((choice.sequential, choice.sequential_length))
        return rows

    def _packs(self, epoch: int) -> list[tuple[int, ...]]:
        rows = self._rows(epoch)
        packs = [
            pack
            for begin in range(0, len(rows), _WINDOW)
            for pack in pack_rows(rows[begin : begin + _WINDOW], self.max_length)
        ]
        if self.shuffle:  # packing sorted them by length
            order = torch.randperm(len(packs), generator=self._generator(epoch, 3)).tolist()
            packs = [packs[index] for index in order]
        return packs


def pack_rows(rows: Sequence[tuple[int, int]], max_length: int) -> list[tuple[int, ...]]:
    """Pack rows by best-fit decreasing.

    Args:
        rows: (index, length) of each.
        max_length: most tokens of a packed row; a longer row stays alone.

    Returns:
        Indices, by packed row.
    """
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, pack), sorted
    for index, length in sorted(rows, key=lambda row: -row[1]):
        at = bisect.bisect_left(rooms, (length, -1))
        if at == len(rooms):
            packs.append([index])
            room = (max_length - length, len(packs) - 1)
        else:
            left, pack = rooms.pop(at)
            packs[pack].append(index)
            room = (left - length, pack)
        bisect.insort(rooms, room)
    return [tuple(pack) for pack in packs]


def group_by_length(
    rows: Sequence[tuple[int, int]], batch_size: int, num_batches: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Order rows so that a batch holds rows of similar length. No row leaves its window of ``num_batches`` batches.

    Args:
        rows: (index, length) of each.
        batch_size: rows per batch.
        num_batches: batches within which rows are ordered.
        generator: draws the order of the batches.
    """
    order: list[tuple[int, int]] = []
    size = batch_size * num_batches
    for begin in range(0, len(rows), size):
        bucket = sorted(rows[begin : begin + size], key=lambda row: row[1])
        batches = [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        order += [row for b in torch.randperm(len(batches), generator=generator).tolist() for row in batches[b]]
    return order
