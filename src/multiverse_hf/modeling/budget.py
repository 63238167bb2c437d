"""The budget of an answer: how many tokens and positions it may still take, with room kept for closing it.

Every limit keeps room for the tokens that bring all that is open to a well-formed end. So these always fit, and only
tokens that the model chooses are charged.
"""

from .cache import LogCache
from .grammar import MAX_LABEL_TOKENS, Event, Stage, Structure
from .state import Branch, FinishReason, Sequence
from .tags import TagSet

ANSWER = -1  # in the place of a number of blocks that stay open: the whole answer ends


class Budget:
    """What one answer may still write.

    Args:
        sequence: with its prompt interpreted.
        context: positions that the model has, None for any number.
        cache: the pool of logs.

    Attributes:
        positions: bound on the answer's length.
        tokens: bound on the answer's tokens, and ``tokens_limit`` what sets it.
        room: tokens that the model may still choose; what closing takes is set aside.

    Raises:
        ValueError: if the prompt or a path can never fit, with the numbers.
    """

    def __init__(self, sequence: Sequence, context: int | None, cache: LogCache) -> None:
        request, length = sequence.request, sequence.prompt_length
        self.sequence, self.structured = sequence, request.structured
        self.path_positions = request.options.max_path_tokens
        self.positions = request.max_new_tokens
        if context is not None:
            self.positions = min(self.positions, context - length)
            if self.positions < 1:
                raise ValueError(
                    f"prompt {request.index} takes {length} positions and the model's context has {context}; "
                    "shorten the prompt"
                )
        self.tokens, self.tokens_limit = request.max_total_tokens, FinishReason.TOTAL
        capacity = cache.capacity - len(request.prompt) - 1
        if not cache.growable and capacity < self.tokens:
            if capacity < 1:
                raise ValueError(
                    f"prompt {request.index} has {len(request.prompt)} tokens and the engine's cache holds "
                    f"{cache.capacity - 1}; shorten it, or raise max_cache_tokens"
                )
            self.tokens, self.tokens_limit = capacity, FinishReason.CACHE
        if self.structured and self.path_positions is not None:
            least = empty_path_length(sequence.live[0].structure.tags)
            if self.path_positions < least:
                raise ValueError(
                    f"max_path_tokens={self.path_positions} leaves no room for a path; it takes at least "
                    f"{least} tokens to begin and end one"
                )
        self.count()

    def count(self) -> None:
        """Count the room from what is open now. From then on :meth:`spend` keeps account of it."""
        sequence = self.sequence
        self.room = self.tokens - sequence.num_written
        if not self.structured:
            return
        live = [(branch.structure, branch.blocks) for branch in sequence.live]
        held = [(block.structure.for_path(path), [*block.branch.blocks, block]) for block, path in sequence.held]
        blocks = {id(block): block for _, around in live + held for block in around}
        self.room -= sum(closing_cost(structure)[0] for structure, _ in live + held)
        self.room -= sum(reduce_cost(block.structure, block.structure.depth - 1) for block in blocks.values())

    def can_close(self) -> bool:
        """Return whether what the prompt leaves open can be closed within the budget."""
        if not self.structured:
            return True
        start = self.sequence.prompt_length
        ends = [branch.position - start + closing_positions(branch.structure) for branch in self.sequence.live]
        return self.room >= 0 and max(ends) <= self.positions

    def spend(self, branch: Branch, token: int) -> tuple[FinishReason, int] | None:
        """Take room for a token that the model chose.

        Returns:
            None, or if there is no room the limit, and how many blocks around the branch shall stay open
            (:data:`ANSWER`: the limit ends the answer).
        """
        structure, cost = branch.structure, 1
        # any other token leaves what closing takes as it is
        if self.structured and (token in structure.tags.roles or structure.stage is Stage.OUTLINE):
            after = structure.copy()
            event = after.feed(token)
            cost += _cost_after(event, after) - closing_cost(structure)[0]
            if event is not Event.TEXT and cost <= 0:  # it closes something, for which there always is room
                self.room -= cost
                return None
            structure = after
        if self.room < cost:
            return self.tokens_limit, ANSWER
        ends = self._ends(branch, structure)
        limit = next((limit for end, limit in ends if branch.position >= end), None)
        if limit is None:
            self.room -= cost
            if structure is branch.structure:
                branch.text_end = min(end for end, _ in ends)
        return limit

    def find_limit(self, branch: Branch) -> tuple[FinishReason, int] | None:
        """Return the limit that leaves a branch no room for any token, as :meth:`spend` does."""
        if self.sequence.num_written >= self.tokens:
            return self.tokens_limit, ANSWER
        return next((limit for end, limit in self._ends(branch, None) if branch.position >= end), None)

    def _ends(self, branch: Branch, structure: Structure | None) -> list[tuple[int, tuple[FinishReason, int]]]:
        """Return for each limit on positions the first position that it has no room for, and the limit.

        Args:
            branch: the branch.
            structure: its state after its next token, which has to be closed too; None to leave that out.
        """
        found = []
        if self.path_positions is not None:
            for level, block in enumerate(branch.blocks):
                found.append((block.branch.position + self.path_positions, (FinishReason.PATH, level), level))
        # siblings may have room left: only this path ends here, and what follows the block ends by itself
        limit = FinishReason.LENGTH, len(branch.blocks) - 1
        found.append((self.sequence.prompt_length + self.positions, limit, ANSWER))
        if structure is None or not self.structured:
            return [(end, limit) for end, limit, _ in found]
        return [(end - closing_positions(structure, keep), limit) for end, limit, keep in found]


def _cost_after(event: Event, structure: Structure) -> int:
    """Return the tokens it takes to close what a branch leaves open by a token, ``structure`` being the state then."""
    if event is Event.TEXT:
        return closing_cost(structure)[0]
    if event is not Event.FORK:  # a path ends; what follows its block was set aside at the fork
        return 0
    paths = range(len(structure.labels[-1]))
    return sum(len(structure.path_prefix(path)) + 1 for path in paths) + reduce_cost(structure, structure.depth - 1)


def closing_cost(structure: Structure) -> tuple[int, int]:
    """Return the (tokens, positions) that :meth:`~.grammar.Structure.closing_tokens` and all that follows from
    them take, up to the end of this branch's own path, or outside every block of the answer."""
    own = len(structure.closing_tokens())
    if structure.stage not in (Stage.ARMED, Stage.GOAL, Stage.OUTLINE):
        return own, own
    labels = structure.path_labels() or [structure.tags.ordinal(1)]
    paths = [len(structure.tags.path_prefix(label)) + 1 for label in labels]
    after = reduce_cost(structure, structure.depth)
    return own + sum(paths) + after, own + max(paths) + after


def reduce_cost(structure: Structure, depth: int) -> int:
    """Return the tokens that end what follows the paths of a block: its ending, and the path or the thinking around.

    Args:
        structure: state of a branch in or before the block.
        depth: blocks around that block.
    """
    tags = structure.tags
    num_tags = len(tags.ending) - tags.names.num_started
    return len(tags.reduce_prefix) + num_tags + bool(depth or structure.thinking)


def closing_positions(structure: Structure, keep: int = ANSWER) -> int:
    """Return the positions it takes to close a branch.

    Args:
        structure: its state.
        keep: how many of the blocks around it stay open; :data:`ANSWER` ends the whole answer.
    """
    after = sum(reduce_cost(structure, depth) for depth in range(keep + 1, structure.depth))
    return closing_cost(structure)[1] + after


def empty_path_length(tags: TagSet) -> int:
    """Return a bound on the positions of a path nothing is written in, in tokens."""
    return len(tags.path_prefix([])) + MAX_LABEL_TOKENS + 1
