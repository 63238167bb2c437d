"""What the benchmarks have a random model write: made-up ids, tags over them, and blocks of a given size, timed."""

import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import ContinuousBatchingConfig

from multiverse_hf.evaluation.experiments.timing import synchronize, time_answers
from multiverse_hf.modeling.budget import empty_path_length
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.modeling.state import GenerationStats
from multiverse_hf.modeling.tags import MULTIVERSE, TagSet

EOS, NEWLINE, COLON, DOT, DIGIT, TAG, TEXT = 0, 1, 2, 3, 4, 16, 64  # ids; those from TEXT on are text
FAR = 1 << 30  # tokens; a limit that is never met, nor looked out for


def small_cache() -> ContinuousBatchingConfig:
    """Return settings for transformers' continuous batching, which takes 60 % of a CPU's memory for its cache by
    default, whatever the work."""
    return ContinuousBatchingConfig(max_memory_percent=0.1)


def make_tags(newlines: bool = True) -> TagSet:
    """Make a tag set over ids at the low end of the vocabulary: the random model needs no tokenizer.

    Args:
        newlines: have newlines between tags, as in real documents. Without, a goal with its last outline leaves
            ``</Goal>`` as the only thing a guided answer may write.
    """
    ids = {tag: TAG + number for number, tag in enumerate(MULTIVERSE.tokens)}
    digits = {str(digit): [DIGIT + digit] for digit in range(10)} | {".": [DOT]}
    pieces = {DIGIT + digit: str(digit) for digit in range(10)} | {COLON: ":", DOT: ".", NEWLINE: " "}
    return TagSet(MULTIVERSE, ids, [NEWLINE] if newlines else [], [COLON], digits, pieces)


def make_goal(tags: TagSet, num_paths: int) -> list[int]:
    """Spell the opening of a block, from ``<Parallel>`` to ``</Goal>``, with an outline of one token a path."""
    goal = [tags.open("parallel"), tags.open("goal")]
    for number in range(1, num_paths + 1):
        goal += [tags.open("outline"), *tags.ordinal(number), TEXT + number, tags.close("outline")]
    return [*goal, tags.close("goal")]


def make_prompts(batch: int, length: int, vocab_size: int, end: Sequence[int] = ()) -> torch.Tensor:
    """Make (batch, length) ids: random text, different in each row, that ends with ``end``.

    Raises:
        ValueError: if ``end`` leaves no room for any text.
    """
    if len(end) >= length:
        raise ValueError(f"the outlines take {len(end)} tokens of a prompt of {length}; raise --prompt")
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(TEXT, vocab_size, (batch, length - len(end)), generator=generator)
    return torch.cat([text, torch.tensor(end, dtype=torch.long).expand(batch, -1)], dim=1)


def make_document(
    tags: TagSet, num_tokens: int, vocab_size: int, path_tokens: tuple[int, int] = (100, 400), seed: int = 0
) -> list[int]:
    """Write a document of random text to train on: blocks of two to four paths, with text between them.

    Args:
        tags: the control tags.
        num_tokens: tokens of the document, exactly.
        vocab_size: ids of text are below it.
        path_tokens: the fewest and the most tokens of text in a path; fewer where the document ends.
        seed: of text and sizes.

    Raises:
        ValueError: if it is too short for a block.
    """
    rng, ids = random.Random(seed), []

    def text(least: int, most: int) -> list[int]:
        return [rng.randrange(TEXT, vocab_size) for _ in range(rng.randint(least, most))]

    while True:
        num_paths = rng.randint(2, 4)
        begin, goal, conclusion = text(20, 80), make_goal(tags, num_paths), text(20, 60)
        room = num_tokens - len(ids) - len(begin) - len(goal) - len(conclusion) - 3  # of its tags
        least = 2 + len(tags.ordinal(num_paths))
        if room < num_paths * (least + path_tokens[0]):
            break
        ids += begin + goal
        for number in range(1, num_paths + 1):
            left = room // (num_paths + 1 - number) - least
            path = text(min(path_tokens[0], left), min(path_tokens[1], left))
            ids += [tags.open("path"), *tags.ordinal(number), *path, tags.close("path")]
            room -= least + len(path)
        ids += [tags.open("conclusion"), *conclusion, tags.close("conclusion"), tags.close("parallel")]
    if not ids:
        raise ValueError(
            f"a document of {num_tokens} tokens has no room for a block of paths of {path_tokens[0]} tokens; take "
            "longer documents, or shorter paths"
        )
    return ids + text(num_tokens - len(ids), num_tokens - len(ids))


# Answers of a given size, forced by the engine's own limits. A logits processor would force them as well, but then the
# engine keeps the ids every branch sees and copies them at every step.


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to have written.

    Attributes:
        num_tokens: tokens of it, all paths together, those the engine writes itself among them.
        num_paths: paths of its one block; 1 for ordinary autoregressive writing, without a block.
        path_tokens: tokens of each path.
        length: its critical path, in tokens.
    """

    num_tokens: int
    num_paths: int
    path_tokens: int
    length: int

    @property
    def options(self) -> dict[str, Any]:
        """Options of the engine's ``generate`` that make it come out like this."""
        options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": self.length, "max_total_tokens": FAR}
        if self.num_paths == 1:
            return options | {"structure": "off"}
        block = {"max_depth": 1, "max_paths": self.num_paths, "max_path_tokens": self.path_tokens}
        return options | block | {"structure": "guided"}

    def check(self, stats: GenerationStats) -> None:
        """Check what was written.

        Raises:
            RuntimeError: if it did not come out like this.
        """
        due = (self.num_tokens, self.length, self.num_paths, int(self.num_paths > 1), 0)
        if (stats.num_tokens, stats.length, stats.max_width, stats.num_forks, stats.malformed) != due:
            raise RuntimeError(f"an answer has to come out as {self}, got {stats}")


def plan_answer(tags: TagSet, num_tokens: int, num_paths: int) -> Answer:
    """Lay out an answer: ``</Goal>``, paths of one length, and the conclusion, which takes what they leave over.

    Raises:
        ValueError: if it is too short for so many paths.
    """
    if num_paths == 1:
        return Answer(num_tokens, 1, num_tokens, num_tokens)
    others = _count_others(tags)
    path_tokens, least = (num_tokens - others) // num_paths, empty_path_length(tags)
    if path_tokens < least:
        raise ValueError(
            f"{num_paths} paths in an answer of {num_tokens} tokens would have {max(path_tokens, 0)} each, and one "
            f"takes at least {least}; have {num_paths * least + others} tokens written, or fewer paths"
        )
    return Answer(num_tokens, num_paths, path_tokens, num_tokens - (num_paths - 1) * path_tokens)


def plan_block(tags: TagSet, num_paths: int, path_tokens: int) -> Answer:
    """Lay out an answer with paths of a given length; one path is an answer of this length without a block.

    Raises:
        ValueError: if a path is too short.
    """
    others = _count_others(tags) if num_paths > 1 else 0
    return plan_answer(tags, num_paths * path_tokens + others, num_paths)


def _count_others(tags: TagSet) -> int:
    """Count the tokens outside the paths: ``</Goal>``, and a conclusion with one token of text."""
    return 1 + len(tags.reduce_prefix) + 1 + len([tags.close("conclusion"), tags.close("parallel")])


@torch.no_grad()
def silence_tags(model: Any, tags: TagSet) -> None:
    """Have a random model never choose a tag by chance: one of zeros is not the greatest of many random scores."""
    model.get_output_embeddings().weight[tags.control_ids] = 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What writing some answers took.

    Attributes:
        prompt_seconds: until the first token of an answer was chosen: the prompts' own pass.
        seconds: from then on.
        stats: of one answer; all of a run are alike.
        num_sampled: tokens of one answer that the model chose; the engine wrote the others.
    """

    prompt_seconds: float
    seconds: float
    stats: GenerationStats
    num_sampled: int


def write(engine: MultiverseEngine, prompts: torch.Tensor, answer: Answer) -> Run:
    """Have an answer written to each prompt, and check that all came out as asked.

    Raises:
        RuntimeError: if one did not.
    """
    timed = time_answers(engine, list(prompts), **answer.options)
    for result in timed.results:
        answer.check(result.stats)
    first = timed.results[0]
    return Run(timed.prompt_seconds, timed.seconds, first.stats, sum(first.sampled))


def steps_in_turns(engines: Sequence[Engine], device: torch.device) -> Iterator[list[float]]:
    """Step engines in turns, each time beginning with another, until the first has nothing left to write.

    Prompts are read before, and are not timed.

    Yields:
        The seconds of each engine's step; not of the step in which the first ended.
    """
    for engine in engines:
        while engine.scheduler.waiting or any(sequence.is_reading for sequence in engine.scheduler.running):
            engine.step()
    order = list(range(len(engines)))
    while True:
        seconds = [0.0] * len(engines)
        for each in order:
            synchronize(device)
            begin = time.perf_counter()
            engines[each].step()
            synchronize(device)
            seconds[each] = time.perf_counter() - begin
        if not engines[0].has_work:
            return
        yield seconds
        order = order[1:] + order[:1]
