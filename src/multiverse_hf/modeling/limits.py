"""Limits of an answer: what it may take, when a branch has to close, and how much closing takes."""

from .cache import LogCache
from .interpreter import Mask, Stage, Structure
from .layout import Event
from .state import Block, Branch, FinishReason, Sequence

ANSWER = -1  # in the place of a number of blocks that stay open: the whole answer ends


def set_limits(sequence: Sequence, context: int | None, cache: LogCache) -> bool:
    """Find what an answer may take, and refuse what can never fit.

    Args:
        sequence: with its prompt read.
        context: positions that the model has, None for any number.
        cache: the pool of logs.

    Returns:
        Whether the blocks that the prompt leaves open can be closed within that.

    Raises:
        ValueError: if the prompt does not fit, with the numbers.
    """
    request, length = sequence.request, sequence.prompt_length
    options = request.options
    sequence.budget = request.max_new_tokens
    if context is not None:
        sequence.budget = min(sequence.budget, context - length)
        if sequence.budget < 1:
            raise ValueError(
                f"prompt {request.index} takes {length} positions and the model's context has {context}; "
                "shorten the prompt"
            )
    sequence.total = request.max_total_tokens
    room = cache.capacity - len(request.prompt) - 1
    if not cache.growable and room < sequence.total:
        if room < 1:
            raise ValueError(
                f"prompt {request.index} has {len(request.prompt)} tokens and the engine's cache holds "
                f"{cache.capacity - 1}; shorten it, or raise max_cache_tokens"
            )
        sequence.total, sequence.total_reason = room, FinishReason.CACHE
    if not request.structured:
        return True
    least = Structure(sequence.live[0].structure.tags).empty_path_length()
    if options.max_path_tokens is not None and options.max_path_tokens < least:
        raise ValueError(
            f"max_path_tokens={options.max_path_tokens} leaves no room for a path; it takes at least "
            f"{least} tokens to begin and end one"
        )
    positions = max(b.position - length + b.structure.closing_positions() for b in sequence.live)
    return positions <= sequence.budget and closing_cost(sequence) <= sequence.total


def structure_mask(sequence: Sequence, branch: Branch) -> Mask | None:
    """Give what a branch may not choose now. Budgets are not among the reasons: a model kept from opening a block
    it wants to open writes what it never learned to."""
    request, structure = sequence.request, branch.structure
    if not request.structured:
        return None
    may_open = structure.depth < request.options.max_depth
    may_outline = len(structure.outlines) < request.options.max_paths
    if request.options.structure == "guided":
        return structure.guide(may_open, may_outline, request.eos)
    return structure.bound(may_open, may_outline)


def find_limit(sequence: Sequence, branch: Branch, token: int | None) -> tuple[FinishReason, int] | None:
    """Find a limit that leaves no room.

    Every limit keeps room for the tokens that bring all that is open to a well-formed end; these always fit.

    Args:
        token: one the branch is about to write; None asks whether there is room for any.

    Returns:
        The limit, and how many blocks around the branch shall stay open (:data:`ANSWER`: it ends the answer).
    """
    request, structure = sequence.request, branch.structure
    if (
        token is not None
        and request.structured
        and (token in structure.tags.roles or structure.stage is Stage.OUTLINE)
    ):
        structure = structure.copy()
        if structure.feed(token) is not Event.TEXT:
            return None  # it closes something
    depth, spare = len(branch.blocks), 64 * (structure.depth + 2)  # more than closing one branch can take
    left = sequence.total - sequence.num_written - 1
    if left < 0:
        return sequence.total_reason, ANSWER
    if token is not None and sequence.live_cost is not None and request.structured:
        others = sequence.reserved + sequence.live_cost - branch_cost(sequence, branch)
        if left < others + structure.closing_cost()[0]:
            return sequence.total_reason, ANSWER
    if request.options.max_path_tokens is not None:
        for level, block in enumerate(branch.blocks):
            left = block.branch.position + request.options.max_path_tokens - branch.position - 1
            if left < 0 or (token is not None and left < spare and left < structure.closing_positions(level)):
                return FinishReason.PATH, level
    left = sequence.prompt_length + sequence.budget - branch.position - 1
    closing = structure.closing_positions() if token is not None and request.structured and left < spare else 0
    if left < closing:
        # siblings may have room left: only this path ends here, and what follows the block ends by itself
        return FinishReason.LENGTH, depth - 1
    return None


def cost_near_end(sequence: Sequence) -> int | None:
    """Count the tokens it takes to close the live branches, if this step may come to where no more are left."""
    left = sequence.total - sequence.num_written - sequence.reserved
    step = 64 * (len(sequence.live) + 1)  # more than one token of each branch can add, forced ones included
    most = 64 * (sequence.stats.depth + 2) + 32 * sequence.request.options.max_paths  # of one branch
    if left >= step + most * len(sequence.live):
        return None
    cost = closing_cost(sequence) - sequence.reserved
    return cost if left < step + cost else None


def closing_cost(sequence: Sequence) -> int:
    """Count the tokens it takes to close an answer."""
    return sequence.reserved + sum(branch_cost(sequence, branch) for branch in sequence.live)


def branch_cost(sequence: Sequence, branch: Branch) -> int:
    """Count the tokens it takes to close a branch, up to the end of its path."""
    return branch.structure.closing_cost()[0] if sequence.request.structured else 0


def path_cost(block: Block, path: int) -> int:
    """Count the tokens of a path that is begun and closed at once."""
    return block.structure.for_path(path).closing_cost()[0]


def block_cost(block: Block) -> int:
    """Count the tokens that follow the paths of a block until it is closed."""
    return block.structure.reduce_cost(block.structure.depth - 1)
