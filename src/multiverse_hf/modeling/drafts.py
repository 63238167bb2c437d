"""Drafts: a branch guesses its next tokens, and the step that reads the guesses checks them.

A draft is what followed the last tokens when they stood in the branch's context before. It is read as further log
entries, and the step chooses a token at each of them. Noise is keyed by position, so a choice is the one that would be
made without drafts. The longest beginning on which choice and draft agree is kept, and the choice after it is free.

What is kept waits in :attr:`~.state.Branch.ready`. The engine writes one token of each live branch at a time, so the
order in which an answer is written, and with it every limit, event and criterion, is the one without drafts. A branch
whose tokens wait goes on from the last of them, unless that is a tag or an end.
"""

import itertools
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .cache import LogCache
from .state import AUTO, Branch, Ready, Sequence

LONGEST = 8  # tokens at the end of a context that are looked for before it, or else as many as there are
MOST = 10  # drafts of a branch in a step, where their number is not set
LEAST_FREE = 64  # log entries that the cache has to have free
LEAST_TRUST = 0.1  # share of right first drafts below which a branch drafts only now and then,
RETRY = 32  # once in so many positions
LEARNING = 0.1  # weight of the last step in the share
MARGIN = 1.1  # drafts have to promise so many times the tokens for the time
NOTING = 0.2  # weight of the last step in what a step costs


class StepCosts:
    """What a decoding step takes, by the log entries that it reads: learned from the steps themselves.

    Attributes:
        known: for each power of two, running means of the number of entries up to it, and of the seconds.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[float, float]] = {}

    def note(self, num_entries: int, seconds: float) -> None:
        """Learn from a step. One that was held up counts as four times what was known at most."""
        size = (num_entries - 1).bit_length()
        number, known = self.known.get(size, (num_entries, seconds))
        known += NOTING * (min(seconds, 4 * known) - known)
        self.known[size] = number + NOTING * (num_entries - number), known

    def __call__(self, num_entries: np.ndarray) -> np.ndarray:
        """Return the seconds of steps: on the lines between what is known, at least what a smaller step takes.

        Past the greatest that is known, the last line goes on.
        """
        if not self.known:
            return np.ones(len(num_entries))
        numbers, seconds = (np.array(each) for each in zip(*sorted(self.known.values()), strict=True))
        seconds = np.maximum.accumulate(seconds)
        slope = (seconds[-1] - seconds[-2]) / (numbers[-1] - numbers[-2]) if len(numbers) > 1 else 0.0
        beyond = np.maximum(num_entries - numbers[-1], 0)
        return np.interp(num_entries, numbers, seconds) + slope * beyond


_costs: "weakref.WeakKeyDictionary[Any, StepCosts]" = weakref.WeakKeyDictionary()


def step_costs(model: Any) -> StepCosts:
    """Return what is known of a model's steps. Engines of one model share it."""
    return _costs.setdefault(model, StepCosts())


def allot(trusts: list[tuple[float, float]], num_asking: int, num_entries: int, costs: StepCosts) -> list[int]:
    """Return how many tokens each branch drafts, so that a step chooses the most tokens for its time.

    Args:
        trusts: of each branch that may draft, its :attr:`~.state.Branch.trust` and :attr:`~.state.Branch.flow`.
        num_asking: branches that choose a token in the step.
        num_entries: log entries that the step reads without drafts, at least 1.
        costs: of a step.
    """
    chances = sorted(
        ((trust * flow**place, -at) for at, (trust, flow) in enumerate(trusts) for place in range(MOST)), reverse=True
    )
    gains = num_asking + np.cumsum([0.0, *(chance for chance, _ in chances)])
    rates = gains / costs(num_entries + np.arange(len(gains)))
    most = int(rates.argmax())
    if rates[most] < MARGIN * rates[0]:
        most = 0
    counts = [0] * len(trusts)
    for _, at in chances[:most]:
        counts[-at] += 1
    return counts


def go_ahead(sequences: list[Sequence], writer: Any, cache: LogCache) -> None:
    """Add to the logs the tokens that wait to be written, so that their branches go on from them.

    Args:
        sequences: running answers.
        writer: the engine's :class:`~.writing.Writer`.
        cache: holds the logs.
    """
    left = count_spare(sequences, cache)
    for sequence in filter(may_draft, sequences):
        for branch in sequence.live:
            last = getattr(branch.ready[-1].chosen, "token", None) if branch.ready else None
            if last is None or acts(last, sequence, writer) or not room(sequence, branch):
                continue
            unread = [ready for ready in branch.ready if ready.entry is None]
            if len(unread) > left:
                continue
            left -= len(unread)
            entries = _add(sequence, branch, [ready.chosen.token for ready in unread], writer)
            for ready, entry in zip(unread, entries, strict=True):
                ready.entry = entry


def draft(sequences: list[Sequence], writer: Any, cache: LogCache, costs: StepCosts, broadcast: Any) -> None:
    """Add the drafts of branches to their logs, to be read in the next step.

    Args:
        sequences: running answers, after :func:`go_ahead`.
        writer: the engine's :class:`~.writing.Writer`.
        cache: holds the logs.
        costs: of a step, where an answer leaves the number of drafts open.
        broadcast: tells all processes what the first one decides (:class:`~.distributed.Broadcast`).
    """
    left = count_spare(sequences, cache)
    able = [
        (sequence, branch)
        for sequence in sequences
        if left > 0 and may_draft(sequence)
        for branch in sequence.live
        if branch.asking and room(sequence, branch)
        if branch.trust >= LEAST_TRUST or branch.position % RETRY == 0
    ]
    free = [branch for sequence, branch in able if sequence.request.options.speculate == AUTO]
    counts = {}
    if free:
        num_asking = sum(bool(branch.asking) for sequence in sequences for branch in sequence.live)
        num_entries = sum(len(sequence.pending) for sequence in sequences)
        shares = broadcast(
            allot([(branch.trust, branch.flow) for branch in free], num_asking, max(num_entries, 1), costs)
        )
        counts = {id(branch): share for branch, share in zip(free, shares, strict=True)}
    for sequence, branch in able:
        most = min(counts.get(id(branch), sequence.request.options.speculate), room(sequence, branch))
        most = min(most, left)
        if most <= 0:
            continue
        context = [*branch.context, *(ready.chosen.token for ready in branch.ready)]
        tokens = find_continuation(context, most)
        tokens = tokens[: next((at for at, token in enumerate(tokens) if acts(token, sequence, writer)), None)]
        branch.drafts = _add(sequence, branch, tokens, writer)
        sequence.stats.num_drafted += len(tokens)
        left -= len(tokens)


def count_spare(sequences: list[Sequence], cache: LogCache) -> int:
    """Return how many log entries drafts may take, so that they push no answer out of the cache."""
    if cache.growable:
        return sys.maxsize
    return cache.num_free - LEAST_FREE - sum(len(sequence.pending) for sequence in sequences)


def may_draft(sequence: Sequence) -> bool:
    """Return whether a running answer drafts in the next step."""
    return bool(sequence.request.options.speculate) and not sequence.is_reading and sequence.request.calls is None


def acts(token: int, sequence: Sequence, writer: Any) -> bool:
    """Return whether a token is more than text: it may end a branch, fork or merge. No draft goes past it."""
    request = sequence.request
    return token in request.eos or (request.structured and token in writer.tags.roles)


def room(sequence: Sequence, branch: Branch) -> int:
    """Return how many positions a branch has after the next token that it chooses."""
    end = sequence.prompt_length + sequence.budget.positions
    return max(end - branch.position - len(branch.ready) - 1, 0)


def _add(sequence: Sequence, branch: Branch, tokens: list[int], writer: Any) -> list[int]:
    """Add tokens to a log after what their branch has, to be read but not written, and return their entries."""
    if not tokens:
        return []
    first = len(sequence.ids)
    while first + len(tokens) > len(sequence.positions):
        writer.grow(sequence)
    entries = list(range(first, first + len(tokens)))
    before = [ready.entry for ready in branch.ready if ready.entry is not None]
    position = branch.position + len(before)
    sequence.ids += tokens
    sequence.positions[entries] = np.arange(position, position + len(tokens))
    sequence.sampled += [False] * len(tokens)
    sequence.labels += [branch.label] * len(tokens)
    sees = branch.sees.copy()
    sees[before + entries] = True
    sequence.pending += [(entry, sees) for entry in entries]
    sequence.num_unwritten += len(entries)
    return entries


def find_continuation(context: list[int], most: int) -> list[int]:
    """Return ``most`` tokens that followed the last tokens of a context where they stood last; none if they are new.

    Of a context that has repeated a few tokens to its end, the repeat goes on.
    """
    longest, after, at, end = 0, 0, -1, len(context) - 1
    while True:
        try:
            at = context.index(context[end], at + 1, end) if end > 0 else -1
        except ValueError:
            at = -1
        if at < 0:
            break
        length = 1
        while length < LONGEST and length <= at and context[at - length] == context[end - length]:
            length += 1
        if length >= longest:
            longest, after = length, at + 1
    period = len(context) - after
    return [context[after + place % period] for place in range(most)] if longest else []


def foresee(sequence: Sequence) -> Iterator[Branch]:
    """Yield each branch that chooses a token now, as it is once what waits is written, and then with each draft."""
    request = sequence.request
    looks = request.sampler.needs_context or request.options.path_repetition_penalty != 1

    def after(branch: Branch, tokens: list[int]) -> Branch:
        structure = branch.structure
        if request.structured:
            structure = structure.copy()
            for token in tokens:
                structure.feed(token)
        context = [*branch.context, *tokens] if looks else branch.context
        return replace(branch, structure=structure, position=branch.position + len(tokens), context=context)

    for branch in sequence.live:
        if not branch.asking:
            continue
        ahead = after(branch, [ready.chosen.token for ready in branch.ready]) if branch.ready else branch
        yield ahead
        for entry in branch.drafts:
            ahead = after(ahead, [sequence.ids[entry]])
            yield ahead


def check_drafts(queries: list[tuple[Sequence, Branch]], choices: list[Any], cache: LogCache) -> None:
    """Make ready what each branch chose, up to its first draft that it did not choose. Other drafts leave the log.

    Args:
        queries: what :func:`foresee` yields for each sequence.
        choices: for each its token (:class:`~.writing.Chosen`), why there is none, or None if the sequence failed.
        cache: holds the logs.
    """
    at = 0
    for sequence, rows in itertools.groupby(sequence for sequence, _ in queries):
        own = choices[at : at + len(list(rows))]
        at += len(own)
        drafted = [branch for branch in sequence.live if branch.drafts]
        for branch in sequence.live:  # none if it failed
            asked = len(branch.asking)
            _make_ready(sequence, branch, own[:asked])
            del own[:asked]
        if drafted:
            _keep_right(sequence, drafted, cache)


def _make_ready(sequence: Sequence, branch: Branch, choices: list[Any]) -> None:
    for chosen, entry in zip(choices, [*branch.drafts, None], strict=bool(choices)):
        if chosen is None:
            break
        is_right = entry is not None and sequence.ids[entry] == getattr(chosen, "token", None)
        branch.ready.append(Ready(chosen, entry if is_right else None))
        if not is_right:
            break
    if branch.drafts and choices[0] is not None:
        first, *after = [
            sequence.ids[entry] == getattr(chosen, "token", None)
            for entry, chosen in zip(branch.drafts, choices, strict=False)
        ]
        branch.trust += LEARNING * (first - branch.trust)
        for is_right in after if first else ():
            branch.flow += LEARNING * (is_right - branch.flow)
            if not is_right:
                break


def _keep_right(sequence: Sequence, drafted: list[Branch], cache: LogCache) -> None:
    """Take a sequence's wrong drafts out of its log. All drafts are at its end."""
    first, num_drafts = drafted[0].drafts[0], sum(len(branch.drafts) for branch in drafted)
    right = [ready for branch in drafted for ready in branch.ready if ready.entry is not None and ready.entry >= first]
    entries = [ready.entry for ready in right]
    cache.keep(sequence.arrival, first, entries)
    sequence.positions[first : first + len(entries)] = sequence.positions[entries]
    for values in (sequence.ids, sequence.sampled, sequence.labels):
        values[first:] = [values[entry] for entry in entries]
    for place, ready in enumerate(right):
        ready.entry = first + place
    sequence.num_computed = first + len(entries)
    sequence.num_unwritten -= num_drafts - len(entries)
    sequence.stats.num_accepted += len(entries)
    for branch in drafted:
        branch.drafts = []


def forget(sequence: Sequence) -> None:
    """Take out of a log, which the cache has lost, what is not written: drafts, and tokens that wait or were dropped.

    Otherwise they would take room of the cache that the budget of the answer counts on.
    """
    for branch in sequence.live:
        branch.drafts = []
        for ready in branch.ready:
            ready.entry = None
    if not sequence.num_unwritten:
        return
    segments, stack = [], [sequence.root]
    while stack:
        segments.append(segment := stack.pop())
        if segment.block is not None:
            stack += [*segment.block.paths, *filter(None, [segment.block.reduced])]
    kept = sorted(entry for segment in segments for entry in segment.entries)
    place = {entry: number for number, entry in enumerate(kept)}

    def moved(values: np.ndarray) -> np.ndarray:
        known = [entry for entry in kept if entry < len(values)]
        result = np.zeros_like(values)
        result[: len(known)] = values[known]
        return result

    for segment in segments:
        segment.entries[:] = [place[entry] for entry in segment.entries]
        if segment.block is not None:
            segment.block.branch.sees = moved(segment.block.branch.sees)
            segment.block.sees[:] = map(moved, segment.block.sees)
    for branch in sequence.live:
        branch.sees = moved(branch.sees)
    sequence.positions = moved(sequence.positions)
    for values in (sequence.ids, sequence.sampled, sequence.labels):
        values[:] = [values[entry] for entry in kept]
    sequence.logits = {place[entry]: value for entry, value in sequence.logits.items()}
    sequence.scores = {place[entry]: value for entry, value in sequence.scores.items()}
    sequence.num_unwritten = 0
