"""The problems of reasoning-gym as prompts for reinforcement learning, and their scores as a reward of TRL."""

from collections.abc import Sequence
from typing import Any

from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.evaluation.answers import judge
from multiverse_hf.evaluation.tasks import gym_task, load_problems
from multiverse_hf.judging.verifier import Verifier


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
    scores = []
    for completion, gold, name, row in zip(completions, answer, task, metadata, strict=True):
        document = completion if isinstance(completion, str) else completion[-1]["content"]
        of = gym_task(name)
        scores.append(judge(of.kind, gold, document, Verifier(), of.scorer(row["id"])).score)
    return scores
