"""Settings of an evaluation, and the check that a folder's run has the same ones."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from multiverse_hf.begun import check_begun, explain_option, name_option, read_begun
from multiverse_hf.checkpoints import MAX_NUM_SEQS, Attention, Dtype
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import RULES_VERSION, AnswerKind
from multiverse_hf.evaluation.task_files import find_task
from multiverse_hf.evaluation.tasks import (
    MAX_NEW_TOKENS,
    TASKS,
    TEMPERATURE,
    TOP_P,
    Instance,
    Mode,
    Task,
)
from multiverse_hf.modeling.families import MULTIVERSE, Family
from multiverse_hf.outputs import json_text


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Settings of an evaluation.

    Attributes:
        model: folder or repository; None for the embedded model.
        revision: revision of a repository.
        tasks: names of tasks, ``rg:GENERATOR`` with options, and paths of a user's own ``.jsonl`` files.
        mode: how the model is asked.
        data_dir: folder with local rows; None for the Hub.
        limit: number of first problems of each task; None for all. A greater limit extends a run.
        num_samples: answers per problem.
        seed: seed of all noise. The noise of a problem's answer k depends only on this seed and k, so runs that differ
            only in their batches have the same answers.
        temperature: 0 takes the likeliest token. By default the family's; so are the next one and ``system_prompt``.
        top_p: draw among the likeliest tokens with this much probability together.
        max_new_tokens: limit of the length: positions past the prompt, not tokens of all paths.
        system_prompt: system message before each problem.
        dtype, attention, device, threads: as for :func:`~multiverse_hf.checkpoints.load_model`.
        max_num_seqs, max_cache_tokens: limits of the engine.
        rule: rule for the answers of a user's own files; ``math`` by default.
        family: the model's family, and ``of_record`` the settings that were taken from it (:meth:`of`).
    """

    model: str | None
    tasks: tuple[str, ...]
    mode: Mode = Mode.PARALLEL
    revision: str = "main"
    data_dir: Path | None = None
    limit: int | None = None
    num_samples: int = 1
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    system_prompt: str | None = None
    dtype: Dtype = Dtype.AUTO
    attention: Attention = Attention.SDPA
    device: str = "auto"
    threads: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    max_cache_tokens: int | None = None
    rule: AnswerKind | None = None
    family: Family = MULTIVERSE
    of_record: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that the settings fit together.

        Raises:
            CommandError: if a task is unknown, or greedy answers are asked for more than once.
        """
        tasks = self.read_tasks()
        if not tasks:
            raise CommandError(f"no task was named; there are {', '.join(TASKS)}")
        names = [task.name for task in tasks]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise CommandError(f"two tasks are called {double}; leave one out, or rename its file")
        if self.rule is not None and not any(task.file for task in tasks):
            raise CommandError(f"--rule {self.rule} is for your own rows; name their file with --task FILE.jsonl")
        if self.temperature == 0 and self.num_samples > 1:
            raise CommandError(
                f"{self.num_samples} greedy answers to a problem would all be the same; give --temperature, or --n 1"
            )

    def read_tasks(self) -> tuple[Task, ...]:
        """Return the tasks.

        Raises:
            CommandError: if there is no such task or file.
        """
        return tuple(find_task(name, self.rule or AnswerKind.MATH) for name in self.tasks)

    def of(self, family: Family) -> "Evaluation":
        """Return the evaluation of a model of a family: what it does not say is the family's."""
        temperature, top_p = family.temperature, 1.0 if family.top_p is None else family.top_p
        if temperature is None:
            temperature, top_p = TEMPERATURE, TOP_P
        given = {"temperature": temperature, "top_p": top_p, "system_prompt": family.system_prompt}
        taken = {name: value for name, value in given.items() if getattr(self, name) is None and value is not None}
        told = tuple(name for name in taken if name != "top_p" or self.temperature != 0)  # greedy: top_p does nothing
        return replace(self, family=family, of_record=told, **taken)

    def prompt(self, problem: Instance) -> str:
        """Return the prompt for a problem, with the sentence of record if the family has one."""
        return problem.prompt(self.mode) if self.family.has_suffix else problem.question

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of the engine. All are set, as a checkpoint's generation config may have others."""
        if self.temperature is None or self.top_p is None:
            return self.of(self.family).sampling
        drawn = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
        if drawn and self.family.path_repetition_penalty != 1:
            drawn["path_repetition_penalty"] = self.family.path_repetition_penalty
        return {
            "do_sample": self.temperature > 0,
            **drawn,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "max_new_tokens": self.max_new_tokens,
            "structure": self.mode.structure,
        }

    def messages(self, problem: Instance) -> str | list[dict[str, str]]:
        """Return the prompt or the messages for a problem."""
        prompt = self.prompt(problem)
        if self.system_prompt is None:
            return prompt
        return [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": prompt}]


Evaluate = Callable[[Evaluation, Path], dict[str, Any]]  # runs it in a folder and returns its results
OPTION_NAMES = {"num_samples": "n", "tasks": "task"}  # settings with another name of their option
# Settings that do not change an answer; they may differ when a run is continued.
_MAY_DIFFER = ("device", "threads", "max_num_seqs", "max_cache_tokens", "data_dir", "model", "family", "of_record")


def check_run(
    path: Path, evaluation: Evaluation, model: str, weights: str, fingerprints: Callable[[int | None], dict[str, str]]
) -> str | None:
    """Check that an evaluation has the settings of the folder's run, if there is one.

    Args:
        path: the folder's ``run.json``.
        evaluation: the settings now.
        model: name of the model.
        weights: fingerprint of the weights.
        fingerprints: returns the fingerprint of each task's first problems, for a limit.

    Returns:
        The text of ``run.json`` if it must be written, because a run begins or is extended; None otherwise.

    Raises:
        CommandError: if the folder is another run's.
    """
    tasks = evaluation.read_tasks()
    asked = {name: value for name, value in asdict(evaluation).items() if name not in (*_MAY_DIFFER, "rule")}
    asked |= {"tasks": [task.name for task in tasks], "weights": weights, "rules_version": RULES_VERSION}
    if any(task.file for task in tasks):
        asked["rule"] = (evaluation.rule or AnswerKind.MATH).value
    asked["problems"] = fingerprints(evaluation.limit)
    begun, stored = json_text(asked | {"model": model}, indent=2), read_begun(path)
    if stored is None:
        if any((path.parent / "samples").glob("*.parquet")):
            raise CommandError(f"{path.parent} holds samples, but no run.json; name another folder")
        return begun
    limit = stored.get("limit")
    asks_more = isinstance(limit, int) and (evaluation.limit is None or evaluation.limit > limit)
    extends = asks_more and stored.get("problems") == fingerprints(limit)

    def explain(name: str, stored: Mapping[str, Any], value: Any) -> str:
        if name == "rules_version":
            return f"with version {stored.get(name, 1)} of the rules for answers, this is version {value}"
        if name == "weights":
            return f"with another model ({stored.get('model')})"
        if name == "problems" or (name == "limit" and asks_more):
            return "with other problems"
        words = explain_option(name, stored, value, lambda name, to: name_option(OPTION_NAMES.get(name, name), to))
        return words + ("; it continues with as many problems or more" if name == "limit" else "")

    check_begun(path.parent, stored, asked, ("limit", "problems") if extends else (), explain)
    return begun if extends else None
