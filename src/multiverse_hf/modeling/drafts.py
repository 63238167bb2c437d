"""Drafts: a branch guesses its next tokens, and the step that reads the guesses checks them.

A draft is what followed the last tokens when they stood in the branch's context before. It is read as further log
entries, and the step chooses a token at each of them. Noise is keyed by position, so a choice is the one that would be
made without drafts. The longest beginning on which choice and draft agree is kept, and the choice after it is free.

What is kept waits in :attr:`~.state.Branch.ready`. The engine writes one token of each live branch at a time, so the
order in which an answer is written, and with it every limit, event and criterion, is the one without drafts.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .cache import LogCache
from .state import Branch, Ready, Sequence

LONGEST = 4  # tokens at the end of a context that are looked for before it, and fewer down to
SHORTEST = 2
LEAST_TRUST = 0.2  # share of right drafts below which a branch drafts only now and then,
RETRY = 32  # once in so many positions
LEARNING = 0.3  # weight of the last step in the share


def draft(sequence: Sequence, writer: Any) -> None:
    """Add the drafts of a sequence's branches to its log, to be read in the next step.

    Args:
        sequence: a running answer.
        writer: the engine's :class:`~.writing.Writer`.
    """
    request, most = sequence.request, sequence.request.options.speculate
    if not most or sequence.is_reading or request.calls is not None:
        return
    last = sequence.prompt_length + sequence.budget.positions
    for branch in sequence.live:
        is_due = branch.trust >= LEAST_TRUST or branch.position % RETRY == 0
        room = min(most, last - branch.position - 1)
        if branch.ready or room < 1 or not is_due:
            continue
        tokens = []
        for token in find_continuation(branch.context, room):
            if token in writer.tags.roles or token in request.eos:
                break
            tokens.append(token)
        if not tokens:
            continue
        first = len(sequence.ids)
        while first + len(tokens) > len(sequence.positions):
            writer.grow(sequence)
        entries = list(range(first, first + len(tokens)))
        sequence.ids += tokens
        sequence.positions[entries] = np.arange(branch.position, branch.position + len(tokens))
        sequence.sampled += [False] * len(tokens)
        sequence.labels += [branch.label] * len(tokens)
        sees = branch.sees.copy()
        sees[entries] = True
        sequence.pending += [(entry, sees) for entry in entries]
        sequence.num_unwritten += len(entries)
        sequence.stats.num_drafted += len(entries)
        branch.drafts = entries


def find_continuation(context: list[int], most: int) -> list[int]:
    """Return up to ``most`` tokens that followed the last tokens of a context where they stood last; none if new."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        if len(context) <= length:
            continue
        tail = context[-length:]
        for at in range(len(context) - length - 1, -1, -1):
            if context[at] == tail[0] and context[at : at + length] == tail:
                return context[at + length : at + length + most]
    return []


def foresee(sequence: Sequence) -> Iterator[Branch]:
    """Yield each branch that chooses a token now, then the same as it is after each of its drafts."""
    for branch in sequence.live:
        if branch.ready:
            continue
        yield branch
        ahead = branch
        for entry in branch.drafts:
            token = sequence.ids[entry]
            structure = ahead.structure.copy()
            if sequence.request.structured:
                structure.feed(token)
            context = [*ahead.context, token]
            ahead = replace(ahead, structure=structure, position=ahead.position + 1, context=context)
            yield ahead


def check_drafts(queries: list[tuple[Sequence, Branch]], choices: list[Any], cache: LogCache) -> None:
    """Make ready what each branch chose, up to its first draft that it did not choose. Other drafts leave the log.

    Args:
        queries: what :func:`foresee` yields for each sequence.
        choices: for each its token (:class:`~.writing.Chosen`), why there is none, or None if the sequence failed.
        cache: holds the logs.
    """
    drafted: list[Sequence] = []
    at = 0
    while at < len(queries):
        sequence, branch = queries[at]
        own = choices[at : at + 1 + len(branch.drafts)]
        at += len(own)
        for chosen, entry in zip(own, [*branch.drafts, None], strict=True):
            if chosen is None:
                break
            is_right = entry is not None and sequence.ids[entry] == getattr(chosen, "token", None)
            branch.ready.append(Ready(chosen, entry if is_right else None))
            if not is_right:
                break
        if branch.drafts:
            share = (len(branch.ready) - 1) / len(branch.drafts)
            branch.trust += LEARNING * (share - branch.trust)
            if not drafted or drafted[-1] is not sequence:
                drafted.append(sequence)
    for sequence in drafted:
        keep_right(sequence, cache)


def keep_right(sequence: Sequence, cache: LogCache) -> None:
    """Take a sequence's wrong drafts out of its log. All drafts are at its end."""
    drafts = [entry for branch in sequence.live for entry in branch.drafts]
    if not drafts:  # it failed
        return
    right = [ready for branch in sequence.live if branch.drafts for ready in branch.ready if ready.entry is not None]
    first, entries = drafts[0], [ready.entry for ready in right]
    cache.keep(sequence.arrival, first, entries)
    sequence.positions[first : first + len(entries)] = sequence.positions[entries]
    for values in (sequence.ids, sequence.sampled, sequence.labels):
        values[first:] = [values[entry] for entry in entries]
    for place, ready in enumerate(right):
        ready.entry = first + place
    sequence.num_computed = first + len(entries)
    sequence.num_unwritten -= len(drafts) - len(entries)
    sequence.stats.num_accepted += len(entries)
    for branch in sequence.live:
        branch.drafts = []


def forget(sequence: Sequence) -> None:
    """Note that the cache has lost a log: its drafts go, and what is ready has to be read when it is written."""
    drafts = [entry for branch in sequence.live for entry in branch.drafts]
    if drafts:
        for values in (sequence.ids, sequence.sampled, sequence.labels):
            del values[drafts[0] :]
        sequence.num_unwritten -= len(drafts)
    for branch in sequence.live:
        branch.drafts = []
        for ready in branch.ready:
            ready.entry = None
