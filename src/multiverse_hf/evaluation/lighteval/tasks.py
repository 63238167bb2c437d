"""The tasks for LightEval 0.13: ``--custom-tasks multiverse_hf.evaluation.lighteval.tasks``.

``mv:math_500`` has the parallel suffix, ``mv:math_500:zero`` and ``mv:math_500:autoregressive`` the sequential one.
The adapter decodes the latter autoregressively. aime24, aime25, gpqa_diamond and chains have the same three tasks.
Prompts, answers and rules are those of ``multiverse eval``. ``mv:math_500@n=4|0`` draws four answers per problem.

LightEval has no options for tasks. These environment variables replace them:

- ``MULTIVERSE_DATA_DIR``: folder with local rows, as ``multiverse eval --data-dir``. Other tasks come from the Hub.
- ``MULTIVERSE_MAX_NEW_TOKENS``: the length budget (default 32768, the paper's context).
- ``MULTIVERSE_TASKS``: generators of reasoning-gym with spaces between, as ``rg:leg_counting,size=50 rg:products``.
  Their tasks are ``rg:leg_counting`` and ``rg:products``, in the three modes, with the metric ``score`` too.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lighteval.metrics.metrics_sample import SampleLevelComputation, SamplingMetric
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc, SamplingMethod

from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import AnswerKind, Verdict, judge
from multiverse_hf.evaluation.lighteval.measures import MEASURES, measure_transformers
from multiverse_hf.evaluation.metrics import avg_at_n, is_well_formed, parallel_rate, pass_at_k
from multiverse_hf.evaluation.tasks import MAX_NEW_TOKENS, TASKS, Mode, Task, find_file, gym_task, read_task_rows
from multiverse_hf.judging.verifier import Verifier
from multiverse_hf.outputs import new_folder

BUDGET = int(os.environ.get("MULTIVERSE_MAX_NEW_TOKENS", MAX_NEW_TOKENS))
DATA_DIR = Path(os.environ["MULTIVERSE_DATA_DIR"]) if os.environ.get("MULTIVERSE_DATA_DIR") else None


# Metrics, from evaluation/metrics.py


@functools.cache
def _verifier() -> Verifier:
    return Verifier()


@functools.lru_cache(maxsize=1 << 16)
def _judge(kind: str, gold: str, text: str, generated: str | None, id: str) -> Verdict:
    """Return the verdict on an answer, judged once for all metrics."""
    score = None if generated is None else gym_task(generated).scorer(id)
    return judge(AnswerKind(kind), gold, text, _verifier(), score)


class OfVerdicts(SamplingMetric, SampleLevelComputation):
    """A metric of the verdicts on a problem's answers.

    Args:
        compute_one: computes the metric from the verdicts, or from the scores.
        of: ``correct`` or ``score``.
        n: answers per problem; ``task@n=4`` sets it.
    """

    def __init__(self, compute_one: Callable[[list[Any]], float], of: str = "correct", n: int = 1) -> None:
        super().__init__()
        self.compute_one, self.of, self.n = compute_one, of, n

    def num_samples(self) -> int:
        """Return the number of answers per problem."""
        return self.n

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs: Any) -> float:
        """Return the metric of the generated texts, which the rules read as whole documents."""
        kind, generated, id = (doc.specific[name] for name in ("kind", "generated", "id"))
        verdicts = [_judge(kind, doc.choices[0], text, generated, id) for text in model_response.text]
        return self.compute_one([getattr(verdict, self.of) for verdict in verdicts])


class OfAnswers(SampleLevelComputation):
    """A metric of the answers' texts, or of the engine's counts (``doc.specific``)."""

    def __init__(self, compute_one: Callable[[list[str], list[Mapping[str, Any]]], float]) -> None:
        self.compute_one = compute_one

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs: Any) -> float:
        """Return the metric."""
        return self.compute_one(model_response.text, doc.specific[MEASURES])


class MeasuredMetric(SampleLevelMetric):
    """A metric of the engine's counts. It is missing if the backend counted nothing.

    Only the adapter and ``accelerate`` count. LightEval's table cannot show None, nor its JSON file NaN.
    """

    def compute_sample(self, **of: Any) -> dict[str, float]:
        """Return the metric by name."""
        return super().compute_sample(**of) if MEASURES in of["doc"].specific else {}


def _mean_of(name: str) -> Callable[[list[str], list[Mapping[str, Any]]], float]:
    return lambda texts, measures: sum(each[name] for each in measures) / len(measures)


def make_metrics(has_scores: bool = False) -> list[SampleLevelMetric]:
    """Return new metrics for a task; ``@n=4`` changes them, so each task has its own."""
    computations = {
        "pass@1": OfVerdicts(lambda verdicts: pass_at_k(len(verdicts), sum(verdicts), 1)),
        "avg@n": OfVerdicts(avg_at_n),
        **({"score": OfVerdicts(lambda scores: sum(scores) / len(scores), "score")} if has_scores else {}),
        "# parallel": OfAnswers(_mean_of("parallelism")),
        "length": OfAnswers(_mean_of("length")),
        "tokens": OfAnswers(_mean_of("num_tokens")),
        "parallel rate": OfAnswers(lambda texts, measures: parallel_rate([each["num_forks"] for each in measures])),
        "well-formed": OfAnswers(lambda texts, measures: sum(map(is_well_formed, texts)) / len(texts)),
    }
    return [
        (MeasuredMetric if isinstance(computation, OfAnswers) else SampleLevelMetric)(
            metric_name=name,
            higher_is_better=name not in ("length", "tokens"),
            category=SamplingMethod.GENERATIVE,
            sample_level_fn=computation,
            corpus_level_fn=np.mean,
        )
        for name, computation in computations.items()
    ]


# Tasks


def prompt_function(task: Task, mode: Mode) -> Callable[[Mapping[str, Any], str], Doc]:
    """Return a function that makes a document of a row."""

    def make_doc(row: Mapping[str, Any], task_name: str) -> Doc:
        problem = task.read(row)
        generated = None if task.generator is None else task.name
        specific = {"kind": task.kind.value, "mode": mode.value, "id": problem.id, "generated": generated}
        return Doc(
            task_name=task_name, query=problem.prompt(mode), choices=[problem.gold], gold_index=0, specific=specific
        )

    return make_doc


def local_dataset(task: Task, data_dir: Path | None) -> Path:
    """Write rows that are not on the Hub for ``load_dataset``: return a folder with ``test.parquet``.

    All columns are text, as it would guess types of JSON, and read some answers as dates.
    """
    import pyarrow
    import pyarrow.parquet
    from huggingface_hub.constants import HF_HOME

    rows = [row for _, row in read_task_rows(task, data_dir)[0]]
    names = sorted({name for row in rows for name in row})
    table = {name: [None if row.get(name) is None else str(row[name]) for row in rows] for name in names}
    digest = hashlib.blake2b(json.dumps(table).encode(), digest_size=8).hexdigest()
    folder = Path(HF_HOME, "multiverse_hf", f"{task.stem}-{digest}")
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as part:
            schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
            pyarrow.parquet.write_table(pyarrow.table(table, schema=schema), part / "test.parquet")
    return folder


def _is_local(task: Task) -> bool:
    if task.dataset is None:
        return True
    if DATA_DIR is None:
        return False
    try:
        find_file(task, DATA_DIR)
    except CommandError:  # the folder may lack a task
        return False
    return True


def make_tasks() -> list[LightevalTaskConfig]:
    """Return every task in every mode."""
    configs = []
    generated = [gym_task(name) for name in os.environ.get("MULTIVERSE_TASKS", "").split()]
    short = {task.name.partition(",")[0]: task for task in generated}  # LightEval puts commas between tasks
    if len(short) < len(generated):
        raise CommandError(f"MULTIVERSE_TASKS names a generator twice: {os.environ['MULTIVERSE_TASKS']}")
    for name, task in (TASKS | short).items():
        local = _is_local(task)
        repo, subset, split = task.dataset, task.config or "default", task.split
        if local:
            repo, subset, split = str(local_dataset(task, DATA_DIR)), "default", "test"
        for mode in Mode:
            configs.append(
                LightevalTaskConfig(
                    name=name if mode is Mode.PARALLEL else f"{name}:{mode.value}",
                    prompt_function=prompt_function(task, mode),
                    hf_repo=repo,
                    hf_subset=subset,
                    hf_avail_splits=[split],
                    evaluation_splits=[split],
                    few_shots_split=split,
                    metrics=make_metrics(task.generator is not None),
                    generation_size=BUDGET,
                    stop_sequence=[],
                    version=task.version,
                )
            )
    return configs


measure_transformers()
TASKS_TABLE = make_tasks()
