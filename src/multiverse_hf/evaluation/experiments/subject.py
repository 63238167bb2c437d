"""Shared parts of the timed experiments: a model with problems to answer, and the description of a result."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from multiverse_hf.checkpoints import Checkpoint, fingerprint, load_model, open_checkpoint
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.evaluation.experiments.timing import Item, Timed
from multiverse_hf.evaluation.run import describe_model
from multiverse_hf.evaluation.settings import Evaluation
from multiverse_hf.evaluation.tasks import ProblemSet, load_problems
from multiverse_hf.provenance import commit, hardware, versions


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, its problems and its settings. Answers are greedy, so that every repeat writes the same."""

    evaluation: Evaluation
    checkpoint: Checkpoint
    model: Any
    problems: ProblemSet

    @classmethod
    def load(cls, evaluation: Evaluation) -> "Subject":
        """Return the model, and the problems of the first task.

        Raises:
            CommandError: if one of them cannot be read, or the model cannot branch.
        """
        problems = load_problems(evaluation.read_tasks()[0], evaluation.data_dir, evaluation.limit)
        checkpoint = open_checkpoint(evaluation.model, evaluation.revision)
        model = load_model(checkpoint, evaluation.dtype, evaluation.attention, evaluation.device, evaluation.threads)
        return cls(evaluation.of(checkpoint.tags.names), checkpoint, model, problems)

    def prompts(self) -> list[list[int]]:
        """Return the prompts' token ids.

        Raises:
            CommandError: if a prompt does not fit the context.
        """
        return [self.checkpoint.encode(self.evaluation.messages(problem)) for problem in self.problems.problems]

    @contextmanager
    def engine(self, max_num_seqs: int) -> Iterator[Callable[..., Timed]]:
        """Create an engine. Yield a function that answers prompts on it greedily and measures the time.

        Raises:
            CommandError: if the cache cannot be created, or is too small.
        """
        from multiverse_hf.evaluation.experiments.timing import time_answers
        from multiverse_hf.modeling.multiverse_engine import MultiverseEngine

        evaluation = self.evaluation
        sampling = evaluation.sampling
        try:
            with MultiverseEngine(
                self.model, max_num_seqs=max_num_seqs, max_cache_tokens=evaluation.max_cache_tokens
            ) as engine:
                yield lambda prompts, **options: time_answers(engine, prompts, **sampling | options)
        except (ValueError, RuntimeError) as err:
            raise CommandError(f"{self.checkpoint.name}: {one_line(err)}; set --max-cache-tokens") from err


def shown(items: Iterable[Item], total: int, title: str) -> Iterable[Item]:
    """Return items, and show their progress in a terminal."""
    console = Console(stderr=True)
    return track(items, title, total, console=console, transient=True, disable=not console.is_terminal)


def describe(subject: Subject, experiment: str) -> dict[str, Any]:
    """Return the model, problems, sampling, versions and hardware of a result."""
    checkpoint = subject.checkpoint
    return {
        "schema": 1,
        "experiment": experiment,
        "model": describe_model(checkpoint, fingerprint(checkpoint)),
        "task": subject.problems.task.name,
        "problems": len(subject.problems.problems),
        "fingerprint": subject.problems.fingerprint,
        "sampling": subject.evaluation.sampling,
        "versions": versions(),
        "hardware": hardware(subject.model.device),
        "commit": commit(leave_out=["docs"]),
    }
