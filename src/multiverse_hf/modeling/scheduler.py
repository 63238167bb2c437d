"""The scheduler: which answers run, and which of their log entries each step reads. It touches host data only.

Answers are admitted in order of arrival. A long prompt is read in chunks, so that running answers go on. When the
cache is full, the answer that came last is preempted: its log is read again later.
"""

import bisect

from .cache import LogCache
from .drafts import forget
from .state import Reading, Sequence, log_visibility


class Scheduler:
    """Decides what the next step reads.

    Args:
        cache: the pool of logs.
        max_num_seqs: answers that may run at once; others wait.
        prefill_chunk: prompt tokens read in one step, of all answers together.

    Attributes:
        waiting, running: answers, both in order of arrival.
        num_preemptions: how often one was preempted.
    """

    def __init__(self, cache: LogCache, max_num_seqs: int, prefill_chunk: int) -> None:
        self.cache, self.max_num_seqs, self.prefill_chunk = cache, max_num_seqs, prefill_chunk
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def sequences(self) -> list[Sequence]:
        """All answers that are not finished."""
        return [*self.running, *self.waiting]

    def add(self, sequence: Sequence) -> None:
        """Put an answer in the queue, in its order of arrival."""
        bisect.insort(self.waiting, sequence, key=lambda each: each.arrival)

    def release(self) -> list[Sequence]:
        """Free the memory of answers without live branches, and return these answers."""
        done = [sequence for sequence in self.sequences if not sequence.live]
        if done:
            for sequence in done:
                self.cache.release(sequence.arrival)
                sequence.pending.clear()
            self.running = [sequence for sequence in self.running if sequence.live]
            self.waiting = [sequence for sequence in self.waiting if sequence.live]
        return done

    def schedule(self) -> list[Reading]:
        """Admit waiting answers, and return what each running one reads in this step. The cache has room for it."""
        if self.waiting:
            self._admit()
        counts: dict[Sequence, int] = {}
        chunk = self.prefill_chunk
        for sequence in list(self.running):
            if sequence not in self.running:  # preempted for the sake of one before it
                continue
            count = len(sequence.pending)
            if sequence.is_reading:
                # what the live branches choose their first tokens from is read in one step, the last one
                asking = [branch for branch in sequence.live if branch.asking]
                num_before = min(branch.asking[0] for branch in asking) - sequence.num_computed
                if count > chunk and num_before > 0:
                    count = min(chunk, num_before)
                chunk = max(chunk - count, 0)
            length = sequence.num_computed + count
            while count and not self.cache.reserve(sequence.arrival, length, length + length // 2 + 64):
                if self._preempt() is sequence:
                    count = 0
            counts[sequence] = count
        batch, begin = [], 0
        for sequence in self.running:
            if count := counts.get(sequence, 0):
                first = sequence.num_computed
                entries, is_last = sequence.pending[:count], count == len(sequence.pending)
                rows: list[int] = []
                for branch in sequence.live if is_last else ():
                    rows += branch.asking if branch.ready or branch.drafts else branch.segment.entries[-1:]
                queries = slice(begin, begin + count)
                batch.append(Reading(sequence, entries, queries, first, first + count, is_last, rows))
                begin += count
        return batch

    def _admit(self) -> None:
        """Let waiting answers in, in order of arrival, while there is room for what they have to read."""
        for sequence in [each for each in self.waiting if each.live]:
            if len(self.running) == self.max_num_seqs:
                return
            length = len(sequence.ids)
            spare = 16 * len(self.running)  # so that those who run are not preempted at once
            if self.running and not self.cache.growable and length + spare > self.cache.num_free:
                return
            if not self.cache.reserve(sequence.arrival, length, length + 256):
                return
            self.waiting.remove(sequence)
            if len(sequence.pending) < length:  # it was preempted
                sequence.pending = log_visibility(sequence)
            sequence.is_reading = True
            bisect.insort(self.running, sequence, key=lambda each: each.arrival)

    def _preempt(self) -> Sequence:
        """Take the cache's memory from the answer that came last, which waits again, and return it."""
        sequence = self.running.pop()
        self.cache.release(sequence.arrival)
        forget(sequence)
        sequence.num_computed = 0
        sequence.pending.clear()
        self.add(sequence)
        self.num_preemptions += 1
        return sequence
