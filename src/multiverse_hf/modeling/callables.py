"""A caller's own logits processors and stopping criteria, which may keep a state for each row of their batch.

Until a row forks they are called as transformers calls them: once a step, with all rows, left-padded prompts as they
came and finished rows filled up with the pad token. Once a row forks, each of its branches has a copy of its own.
A processor's copy has been called for each token that the branch sees, as on a lone sequence. A copy is given the
branch's ids in as many rows as the batch has, since an object may have been made for that number of rows. Copies are
made by ``copy.deepcopy``. A function is its own copy, and so is an object that says so by ``__deepcopy__``.

transformers' own processors and criteria keep no state, and look at each branch's visible ids by themselves
(:mod:`~.sampling`, :mod:`~.writing`). So does one of the caller's that has the attribute ``is_stateless = True``: its
result depends on its arguments alone, and its rows may be branches of any prompts, without padding.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .sampling import CallersProcessor
from .state import Branch
from .state import Sequence as Answer

_OWN = ("transformers.generation.logits_process", "transformers.generation.stopping_criteria")
_STATEFUL = ("SynthIDTextWatermarkLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor")
_SHARED = (torch.nn.Module, PreTrainedTokenizerBase, PretrainedConfig)  # what a copy need not have of its own


def is_callers(each: Any) -> bool:
    """Return whether a processor or criterion may keep a state.

    Those of transformers keep none, but for two. One of the caller's says so by ``is_stateless = True``.
    """
    if getattr(each, "is_stateless", False) is True:
        return False
    return type(each).__module__ not in _OWN or type(each).__name__ in _STATEFUL


def copy_of(each: Any) -> Any:
    """Return a copy of a processor or criterion; models, tokenizers and configs in it are shared.

    Raises:
        ValueError: if it cannot be copied, with its class and the way out.
    """
    shared = {id(value): value for value in getattr(each, "__dict__", {}).values() if isinstance(value, _SHARED)}
    try:
        return copy.deepcopy(each, shared)
    except Exception as err:
        raise ValueError(
            f"{name_of(each)} keeps a state that cannot be copied ({err}), and each branch needs its own; pass "
            "structure='off', or a processor that can be copied with copy.deepcopy"
        ) from err


def name_of(each: Any) -> str:
    """Return what to call a processor or criterion in an error."""
    return getattr(each, "__qualname__", type(each).__name__)


class BatchCalls:
    """The caller's processors and criteria of one call of ``generate``.

    Args:
        processors, criteria: as the caller gave them.
        input_ids: (B, W) the prompts, padded as they came, a row for each answer.
        pad_token_id: what finished rows are filled up with.
    """

    def __init__(
        self,
        processors: Sequence[Callable[..., torch.Tensor]],
        criteria: Sequence[Callable[..., torch.Tensor]],
        input_ids: torch.Tensor,
        pad_token_id: int,
    ) -> None:
        self.processors, self.criteria = list(processors), list(criteria)
        self.input_ids, self.pad = input_ids, pad_token_id
        self.answers: list[Answer | None] = [None] * len(input_ids)
        self._last = -1  # ids that a lone row's processors were last called with
        self._like = torch.empty(0)  # scores as processors are called with
        self._pristine: list[Any] = []  # of a batch, before the first call; an error if there is no copy
        for each in self.processors if len(input_ids) > 1 else ():
            try:
                self._pristine.append(copy_of(each))
            except ValueError as err:  # only a fork needs the copy
                self._pristine.append(err)
        self._states: dict[Branch, list[tuple[Any, int]]] = {}  # a branch's processors, each with its last length
        self._criteria: dict[Branch, list[Any]] = {}

    def stand_in(self, each: Any) -> Any:
        """Return what stands for a processor in a chain."""
        return CallersProcessor(self.processors.index(each))

    # Rows that have not forked

    def _has_forked(self, answer: Answer) -> bool:
        return answer.root.block is not None

    def _own_rows(self, rows: Sequence[tuple[Answer, Branch]]) -> dict[int, int]:
        """Return for each row of the batch that writes and has not forked its place in ``rows``."""
        return {answer.request.index: at for at, (answer, _) in enumerate(rows) if not self._has_forked(answer)}

    def _batch(self, length: int) -> torch.Tensor:
        """Return (B, W + length) ids: each row's text outside every block, filled up with the pad token."""
        ids = torch.full((len(self.answers), length), self.pad)
        for row, answer in enumerate(self.answers):
            if answer is not None:
                entries = answer.root.entries[len(answer.request.prompt) :][:length]
                ids[row, : len(entries)] = torch.tensor([answer.ids[entry] for entry in entries], dtype=torch.long)
        return torch.cat([self.input_ids, ids.to(self.input_ids)], dim=1)

    def process(
        self, processor: CallersProcessor, rows: Sequence[tuple[Answer, Branch]], scores: torch.Tensor
    ) -> torch.Tensor:
        """Run one of the caller's processors on a step's branches.

        Args:
            processor: its place in the chain.
            rows: the answer and the branch of each row.
            scores: (N, V).

        Returns:
            (N, V) scores.

        Raises:
            ValueError: if it gives other scores than asked for, or cannot be copied for a branch.
        """
        index, own = processor.index, self._own_rows(rows)
        out, self._like = scores.clone(), scores
        if own:
            length = max(rows[at][0].num_written for at in own.values())
            batch = torch.zeros(len(self.answers), scores.shape[1], dtype=scores.dtype, device=scores.device)
            for row, at in own.items():
                batch[row] = scores[at]
            self._last = len(rows[0][1].context)
            given = _checked(self.processors[index], self._batch(length).to(scores.device), batch)
            for row, at in own.items():
                out[at] = given[row]
        for at, (answer, branch) in enumerate(rows):
            if self._has_forked(answer):
                each, last, failed = self._caught_up(answer, branch, index)
                row, ids = answer.request.index, self._ids_of(answer, branch, last)
                repeated = scores[at].expand(len(self.answers), -1).clone()
                try:
                    out[at] = _checked(each, ids, repeated)[row]
                except Exception as err:
                    if failed is None:
                        raise
                    raise ValueError(
                        f"{name_of(each)} does not take the tokens that the engine writes where branches begin "
                        f"({failed}); pass structure='off', or a processor that accepts the control tags"
                    ) from err
        return out

    def stops(self, rows: Sequence[tuple[Answer, Branch]], device: torch.device) -> list[tuple[Answer, Branch]]:
        """Ask the caller's criteria after a step.

        Args:
            rows: the answer and the branch of each token that was chosen, and neither forked nor closed.
            device: where criteria expect the ids.

        Returns:
            The branches that a criterion ends.
        """
        own, found = self._own_rows(rows), []
        if own:
            length = max(rows[at][0].num_written for at in own.values())
            ids = self._batch(length).to(device)
            done = torch.zeros(len(ids), dtype=torch.bool)
            for criterion in self.criteria:
                done |= _as_rows(criterion(ids, None), len(ids))
            found += [rows[at] for row, at in own.items() if done[row]]
        for answer, branch in rows:
            if self._has_forked(answer):
                if branch not in self._criteria:
                    self._criteria[branch] = [copy_of(each) for each in self._criteria_of(branch)]
                ids = self._ids_of(answer, branch, len(branch.context)).to(device)
                done = [_as_rows(each(ids, None), len(ids)) for each in self._criteria[branch]]
                if any(bool(each[answer.request.index]) for each in done):
                    found.append((answer, branch))
        return found

    # Branches

    def _ids_of(self, answer: Answer, branch: Branch, length: int) -> torch.Tensor:
        """Return (B, ...) equal rows: the first ``length`` ids that a branch sees, its prompt padded as it came."""
        ids, prompt = branch.context[:length], list(answer.request.prompt)
        row = self.input_ids[answer.request.index]
        if ids[: len(prompt)] == prompt:
            ids = torch.cat([row, torch.tensor(ids[len(prompt) :], dtype=row.dtype, device=row.device)])
        else:  # a prompt that ends inside a block: the branch does not see all of it
            ids = torch.tensor(ids, dtype=row.dtype, device=row.device)
        return ids.expand(len(self.answers), -1).clone()

    def _caught_up(self, answer: Answer, branch: Branch, index: int) -> tuple[Any, int, Exception | None]:
        """Return a branch's copy of a processor, called for all tokens but the one to come, and the length it sees.

        The last value is what it raised on the way: one without state may know only places where a token is chosen.
        """
        if branch not in self._states:
            self._states[branch] = [(copy_of(each), last) for each, last in self._source(answer, branch)]
        (each, last), failed = self._states[branch][index], None
        length = len(branch.context)
        # Tokens that the engine wrote, or other paths. What is its own copy, such as a function, keeps no state.
        for seen in () if each is self.processors[index] else range(last + 1, length):
            ids = self._ids_of(answer, branch, seen)
            try:
                each(ids, self._like.new_zeros(len(ids), self._like.shape[1]))
            except Exception as err:
                failed = failed or err
        self._states[branch][index] = each, length
        return each, length, failed

    def _source(self, answer: Answer, branch: Branch) -> list[tuple[Any, int]]:
        """Return the processors that a branch goes on from, each with the length of its last call."""
        parent = _parent(branch)
        if parent is not None:
            if parent not in self._states:
                self._states[parent] = [(copy_of(each), last) for each, last in self._source(answer, parent)]
            return self._states[parent]
        if len(self.answers) == 1 and self._last >= 0:
            return [(each, self._last) for each in self.processors]
        for each in self._pristine:
            if isinstance(each, ValueError):
                raise each
        untouched = self._pristine or self.processors  # a lone prompt that ends inside a block
        prompt = list(answer.request.prompt)
        begin = len(prompt) if branch.context[: len(prompt)] == prompt else len(branch.context)
        return [(each, begin - 1) for each in untouched]

    def _criteria_of(self, branch: Branch) -> list[Any]:
        """Return the criteria that a branch goes on from: those of the branch that forked. What a path said is its
        own, so a criterion that ended it does not end the branch after the block."""
        parent = _parent(branch)
        return self.criteria if parent is None else self._criteria.get(parent, self._criteria_of(parent))


def _parent(branch: Branch) -> Branch | None:
    """Return the branch that forked before this one began, None for an answer's first."""
    if branch.after is not None:
        return branch.after.branch
    return branch.blocks[-1].branch if branch.blocks else None


def _checked(each: Any, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Call a processor and check what it gives."""
    shape, dtype = scores.shape, scores.dtype
    given = each(ids, scores)
    if not isinstance(given, torch.Tensor) or given.shape != shape or not given.is_floating_point():
        found = f"{tuple(given.shape)} {given.dtype}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise ValueError(f"the logits processor {name_of(each)} gave {found} for scores {tuple(shape)} {dtype}")
    return given.to(dtype)


def _as_rows(done: Any, count: int) -> torch.Tensor:
    """Read what a criterion gives: (B,) bool, or one bool for all rows."""
    done = torch.as_tensor(done, dtype=torch.bool).cpu().reshape(-1)
    return done if len(done) == count else done.any().expand(count)
