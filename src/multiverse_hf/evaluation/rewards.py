"""Rewards for reinforcement learning, as TRL calls them, and the problems of reasoning-gym as prompts.

A reward takes ``completions`` and the columns of the batch by name, and returns a number for each completion. Columns
are those of the dataset (``answer``, ``task``, ``metadata``), and those of
:func:`~multiverse_hf.training.grpo.engine_rollout` (``document``, ``length``, ``num_tokens``, ``malformed``,
``trivial``).
"""

import functools
import importlib.util
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.errors import FAILURE, CommandError, one_line
from multiverse_hf.evaluation.answers import AnswerKind, judge
from multiverse_hf.evaluation.tasks import gym_task, load_problems
from multiverse_hf.judging.verifier import Verifier

Reward = Callable[..., list[float]]
MOST_ACCELERATION = 0.2  # P-GRPO: more parallelism than this earns no more


def make_prompts(*names: str, suffix: Suffix = Suffix.PARALLEL) -> Any:
    """Return a ``datasets.Dataset`` with the columns ``prompt``, ``answer``, ``task`` and ``metadata``.

    Args:
        names: tasks such as ``rg:leg_counting,seed=0,size=1000``.
        suffix: the sentence at the end of the prompts.

    Raises:
        CommandError: if there is no such generator, or an option does not fit.
    """
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": suffix.end(problem.question)}],
                "answer": problem.gold,
                "task": task.name,
                "metadata": {"id": problem.id},
            }
            for task in map(gym_task, names)
            for problem in load_problems(task).problems
        ]
    )


def score_answer(
    completions: Sequence[Any],
    *,
    answer: Sequence[str],
    task: Sequence[str],
    metadata: Sequence[dict[str, str]],
    **columns: Any,
) -> list[float]:
    """Return reasoning-gym's score of each completion, from 0 to 1: a reward function of TRL.

    Args:
        completions: texts, or conversations whose last message is the answer.
        answer, task, metadata: columns of :func:`make_prompts`.
        columns: other columns, which are not used.
    """
    return right(completions, answer=answer, task=task, metadata=metadata, **columns)


# Rewards by name


def right(
    completions: Sequence[Any], *, answer: Sequence[str], task: Sequence[str] | None = None, **columns: Any
) -> list[float]:
    """Return 1 for a right answer and 0 for a wrong one; reasoning-gym's own score for its problems.

    ``task`` is ``chains``, a name of reasoning-gym, or anything else: math-verify then compares the answers.
    """
    documents = columns.get("document") or [_text(completion) for completion in completions]
    ids = [(row or {}).get("id", "") for row in columns.get("metadata") or [None] * len(documents)]
    tasks = task or ["math"] * len(documents)
    return [_score(*row) for row in zip(tasks, answer, documents, ids, strict=True)]


def well_formed(completions: Sequence[Any], *, malformed: Sequence[bool], **columns: Any) -> list[float]:
    """Return 1 for a document with well-formed blocks, or without blocks, else 0."""
    return [float(not bad) for bad in malformed]


def acceleration(
    completions: Sequence[Any], *, length: Sequence[int], num_tokens: Sequence[int], **columns: Any
) -> list[float]:
    """Return P-GRPO's ``0.5 * min(1 - length / tokens, 0.2)`` for a right answer, 0 for others."""
    return [
        0.5 * min(1 - longest / max(tokens, 1), MOST_ACCELERATION) if score == 1 else 0.0
        for longest, tokens, score in zip(length, num_tokens, right(completions, **columns), strict=True)
    ]


def longest_path(completions: Sequence[Any], *, length: Sequence[int], **columns: Any) -> list[float]:
    """Return minus the length of the longest path, in thousands of tokens."""
    return [-tokens / 1000 for tokens in length]


def trivial_forks(completions: Sequence[Any], *, trivial: Sequence[float], **columns: Any) -> list[float]:
    """Return minus the share of paths that are almost empty or copy a sibling."""
    return [-share for share in trivial]


REWARDS = {each.__name__: each for each in (right, well_formed, acceleration, longest_path, trivial_forks)}


@functools.lru_cache(maxsize=4096)  # `acceleration` asks again what `right` asked
def _score(task: str, gold: str, document: str, id: str) -> float:
    if task.startswith("rg:"):
        of = gym_task(task)
        return judge(of.kind, gold, document, _verifier(), of.scorer(id)).score
    kind = AnswerKind.CHAINS if task == "chains" else AnswerKind.MATH
    return float(judge(kind, gold, document, _verifier()).correct)


@functools.cache
def _verifier() -> Verifier:
    return Verifier()


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def find_reward(name: str, timeout_s: float = 60.0) -> Reward:
    """Return a reward by its name, or a function of a user's file, as ``file.py:name``, guarded.

    Raises:
        CommandError: if there is no such reward.
    """
    file, colon, function = name.rpartition(":")
    if not colon:
        if name not in REWARDS:
            raise CommandError(f"no reward {name!r}; name one of {', '.join(REWARDS)}, or a function as file.py:name")
        return guard(REWARDS[name], timeout_s)
    if not Path(file).is_file():
        raise CommandError(f"no file {file} for the reward {name}; give file.py:name")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as err:  # a user's code
        raise CommandError(f"{file} does not load: {type(err).__name__}: {one_line(err)}") from err
    if not callable(found := getattr(module, function, None)):
        raise CommandError(f"{file} has no function {function}; give file.py:name")
    return guard(found, timeout_s)


def guard(reward: Reward, timeout_s: float) -> Reward:
    """Return a reward that is called for one completion at a time, with a time limit.

    One that raises, hangs, or returns no finite number ends the run in a line that names the prompt.
    """

    @functools.wraps(reward)
    def guarded(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        rewards = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            own = {
                name: [values[row]] if isinstance(values, list) else values
                for name, values in columns.items()
                if name not in ("log_extra", "log_metric", "trainer_state")
            }
            rewards.append(_call(reward, {"prompts": [prompt], "completions": [completion], **own}, timeout_s))
        return rewards

    return guarded


def _call(reward: Reward, arguments: dict[str, Any], timeout_s: float) -> float:
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(reward(**arguments))
        except Exception as err:  # a user's code
            outcome.append(err)

    thread = threading.Thread(target=work, daemon=True)  # a stuck one does not keep the process alive
    thread.start()
    thread.join(timeout_s)
    result = outcome[0] if outcome else None
    if not outcome:
        problem = f"took longer than {timeout_s:g} s"
    elif isinstance(result, CommandError):
        raise result
    elif isinstance(result, Exception):
        problem = f"raised {type(result).__name__}: {one_line(result, 200)}"
    else:
        try:
            (value,) = map(float, result)
            if math.isfinite(value):
                return value
            problem = f"returned {value}, which is no finite number"
        except (TypeError, ValueError):
            problem = (
                f"returned {one_line(repr(result), 100)}, but a list with one number for each completion is needed"
            )
    (prompt,) = arguments["prompts"]
    raise CommandError(
        f"the reward {reward.__name__} {problem}, for the prompt {one_line(_text(prompt), 200)!r}; mend it, and go on "
        "with --resume_from_checkpoint true",
        FAILURE,
    )
