"""A run: it answers and judges every problem of some tasks, and can be resumed at any time.

One folder holds one run: ``run.json`` (its settings), ``samples/`` (answers), and at the end ``results.json`` and the
report.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import Checkpoint, fingerprint, load_model, open_checkpoint
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.evaluation.answers import AnswerKind, judge, opened_thinking
from multiverse_hf.evaluation.chains import training_problems
from multiverse_hf.evaluation.metrics import is_well_formed
from multiverse_hf.evaluation.samples import Sample, SampleStore
from multiverse_hf.evaluation.settings import Evaluation, check_run
from multiverse_hf.evaluation.tasks import Instance, Mode, ProblemSet, Task, load_problems
from multiverse_hf.judging.verifier import Verifier
from multiverse_hf.outputs import check_output, write_output

_POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Trial:
    """One answer to generate."""

    task: Task
    problem: Instance
    sample: int
    seed: int

    @property
    def key(self) -> tuple[str, str, int]:
        """As :attr:`Sample.key`."""
        return self.task.name, self.problem.id, self.sample


@dataclass(frozen=True, slots=True)
class RunProgress:
    """Progress of a run."""

    done: int
    total: int
    correct: int


def sample_seed(seed: int, sample: int) -> int:
    """Return the seed of a problem's k-th answer. Runs with different seeds share none."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{sample}".encode(), digest_size=7).digest(), "little")


# The run


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that is complete.

    Attributes:
        problem_sets: the problems of the run.
        num_seen: by task, the problems left out because the model's ``run.json`` says that it was trained on them.
        samples: all samples, in the order of tasks and problems.
        model: description of the model.
        num_before: samples that an earlier command had finished.
        seconds: time of this command to answer and judge.
        device: the model's ``torch.device``; None if nothing was left to answer.
    """

    evaluation: Evaluation
    problem_sets: tuple[ProblemSet, ...]
    num_seen: dict[str, int]
    samples: tuple[Sample, ...]
    model: dict[str, Any]
    num_before: int
    seconds: float
    device: Any


def run_evaluation(
    evaluation: Evaluation, output: Path, on_progress: Callable[[RunProgress], None] = lambda progress: None
) -> Finished:
    """Answer and judge the unfinished problems of a run.

    Raises:
        CommandError: if the model, a task's rows or the folder are invalid. Finished samples are kept.
    """
    check_output(output, is_folder=True)
    found = [load_problems(task, evaluation.data_dir, evaluation.limit) for task in evaluation.read_tasks()]
    checkpoint = open_checkpoint(evaluation.model, evaluation.revision, needs_tags=False)
    if evaluation.mode is not Mode.AUTOREGRESSIVE and not checkpoint.has_tags:
        raise CommandError(
            f"{checkpoint.name} has no control tags and cannot branch; evaluate it with --mode autoregressive"
        )
    evaluation = evaluation.of(checkpoint.tags.names)
    problem_sets, num_seen = leave_out_seen(found, checkpoint.path)
    weights = fingerprint(checkpoint)

    def fingerprints(limit: int | None) -> dict[str, str]:
        kept, _ = leave_out_seen([each.first(limit) for each in found], checkpoint.path)
        return {each.task.name: each.fingerprint for each in kept}

    begun = check_run(output / "run.json", evaluation, checkpoint.name, weights, fingerprints)
    trials = [
        Trial(problems.task, problem, number, sample_seed(evaluation.seed, number))
        for problems in problem_sets
        for problem in problems.problems
        for number in range(evaluation.num_samples)
    ]
    begin = time.perf_counter()
    model = None
    with SampleStore(output / "samples") as store, Verifier() as verifier:
        if begun is not None:  # only now: the store keeps other processes out
            write_output(output / "run.json", begun)
        left = [trial for trial in trials if trial.key not in store.samples]
        if left:
            model = load_model(
                checkpoint, evaluation.dtype, evaluation.attention, evaluation.device, evaluation.threads
            )
        correct = sum(sample.correct for sample in store.samples.values())
        on_progress(RunProgress(len(trials) - len(left), len(trials), correct))
        for done, answered in enumerate(answer_trials(evaluation, checkpoint, model, left) if left else (), start=1):
            sample = make_sample(evaluation, answered, verifier)
            store.add(sample)
            correct += sample.correct
            on_progress(RunProgress(len(trials) - len(left) + done, len(trials), correct))
        samples = tuple(store.samples[trial.key] for trial in trials)
    return Finished(
        evaluation,
        tuple(problem_sets),
        num_seen,
        samples,
        describe_model(checkpoint, weights),
        len(trials) - len(left),
        time.perf_counter() - begin,
        None if model is None else model.device,
    )


@dataclass(frozen=True, slots=True)
class Answered:
    """An answered trial.

    Attributes:
        document: the answer with its tags. It begins with the tag of thinking that a chat template opened in the
            prompt: without it, cut-off thinking would be judged as an answer.
        ids: token ids of the answer, with the end token.
        stats: ``GenerationStats`` of the answer.
        seconds: time from submission to end.
        error: why the trial could not be answered; None if it was.
    """

    trial: Trial
    document: str
    ids: list[int]
    stats: Any
    seconds: float
    error: str | None = None


def answer_trials(
    evaluation: Evaluation, checkpoint: Checkpoint, model: Any, trials: Sequence[Trial]
) -> Iterator[Answered]:
    """Yield the answers of one engine to trials, as they come. Each answer depends only on its own trial.

    Raises:
        CommandError: if the engine cannot be created.
    """
    from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
    from multiverse_hf.modeling.state import GenerationStats

    limits = {"max_num_seqs": evaluation.max_num_seqs, "max_cache_tokens": evaluation.max_cache_tokens}
    try:
        engine = MultiverseEngine(model, **limits)
    except ValueError as err:
        raise CommandError(f"{checkpoint.name}: {one_line(err)}") from err
    waiting, running = list(reversed(trials)), []
    with engine:
        while waiting or running:
            while waiting and len(running) < 2 * evaluation.max_num_seqs:  # half of them wait for a free place
                trial = waiting.pop()
                try:
                    ids = checkpoint.encode(evaluation.messages(trial.problem))
                    handle = engine.submit(ids, seed=trial.seed, **evaluation.sampling)
                except (CommandError, ValueError) as err:  # usually one prompt that is too long for the context
                    yield Answered(trial, "", [], GenerationStats(num_steps=0), 0.0, one_line(err))
                    continue
                running.append((trial, handle, time.perf_counter(), opened_thinking(checkpoint.decode(ids[-16:]))))
            still = []
            for trial, handle, begin, opened in running:
                if not handle.done:
                    still.append((trial, handle, begin, opened))
                    continue
                result, seconds = handle.result(), time.perf_counter() - begin
                yield Answered(trial, opened + checkpoint.decode(result.ids), result.ids, result.stats, seconds)
            if running and len(still) == len(running):
                time.sleep(_POLL_S)
            running = still


def make_sample(evaluation: Evaluation, answered: Answered, verifier: Verifier) -> Sample:
    """Return the judged sample of an answer."""
    trial, stats = answered.trial, answered.stats
    problem = trial.problem
    verdict = judge(trial.task.kind, problem.gold, answered.document, verifier, trial.task.scorer(problem.id))
    counted = ("num_tokens", "length", "parallelism", "num_steps", "num_forks", "max_width", "depth", "num_closed")
    return Sample(
        task=trial.task.name,
        id=trial.problem.id,
        group=trial.problem.group,
        sample=trial.sample,
        seed=trial.seed,
        prompt=evaluation.prompt(trial.problem),
        document=answered.document,
        gold=trial.problem.gold,
        answer=verdict.answer,
        correct=verdict.correct,
        rule=verdict.rule.value,
        score=verdict.score,
        well_formed=answered.error is None and is_well_formed(answered.document, evaluation.family),
        **{name: getattr(stats, name) for name in counted},
        malformed=stats.malformed,
        finish_reason=str(stats.finish_reason) if answered.error is None else "refused",
        seconds=round(answered.seconds, 4),
        error=answered.error,
    )


# Model and problems


def leave_out_seen(problem_sets: Sequence[ProblemSet], model: str) -> tuple[list[ProblemSet], dict[str, int]]:
    """Return problem sets without chains problems that the model was trained on, and their number by task.

    Raises:
        CommandError: if no problem is left.
    """
    kept, counts = [], {}
    for each in problem_sets:
        seen = training_problems(model) if each.task.kind is AnswerKind.CHAINS and each.task.file is None else set()
        problems = tuple(problem for problem in each.problems if problem.question not in seen)
        counts[each.task.name] = len(each.problems) - len(problems)
        if not problems:
            raise CommandError(f"{each.task.name}: the model was trained on all {len(each.problems)} of the problems")
        kept.append(replace(each, problems=problems))
    return kept, counts


def describe_model(checkpoint: Checkpoint, weights: str) -> dict[str, Any]:
    """Return the description of a model for the results."""
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "commit": getattr(checkpoint.config, "_commit_hash", None),
        "fingerprint": weights,
        "architecture": (checkpoint.config.architectures or [checkpoint.config.model_type])[0],
        "dtype": str(getattr(checkpoint.config, "dtype", None)).removeprefix("torch."),
    }
