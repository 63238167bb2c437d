"""``results.json``: the results of a run, as JSON for other programs (model cards, comparisons).

Names are stable within a ``schema``. A removed name or a changed meaning raises it; a new name does not::

    {
      "schema": 1,
      "model": {
        "name": "owner/name or folder",           as given to the run
        "revision": "main", "commit": str | null,   of a repository, and the commit that was read
        "fingerprint": str,                         of the files of a folder; of a repository the commit
        "architecture": "Qwen3ForCausalLM", "dtype": "bfloat16"
      },
      "mode": "parallel" | "zero" | "autoregressive",
      "prompts": {
        "system_prompt": str | null,
        "suffix": str,                              the sentence at the end of each prompt
        "template": "{problem} ..."                 the user's message
      },
      "sampling": {"do_sample": bool, "temperature": float, "top_p": float, "top_k": 0, "repetition_penalty": 1.0,
                   "max_new_tokens": int, "structure": "guided" | "off"},       no temperature and top_p if greedy
      "family": str,                                of the model's tags
      "of_record": ["temperature", ...],            settings taken from the family
      "n": int,                                     answers to each problem
      "seed": int,
      "tasks": {
        "mv:math_500": {
          "version": int, "dataset": "HuggingFaceH4/MATH-500" | null, "source": str, "fingerprint": str,
          "gated": bool,
          "rule": "math" | "letter" | "chains" | "exact" | "reasoning-gym",   the rule for its answers
          "options": {str: ...} | null,             of a generator of reasoning-gym, with its defaults
          "problems": int, "samples": int,
          "seen_in_training": int,                  problems that were left out
          "limit": int | null,                      number of first problems; null: all
          "metrics": {name: {"value": float, "low": float, "high": float}, ...},
          "groups": {"level 5": {"problems": int, "metrics": {...}}, ...},
          "rules": {"math-verify": int, ...},       samples by deciding rule
          "finish_reasons": {"stop": int, ...}
        }, ...
      },
      "rules_version": int,                         of the rules; 1 if it is missing
      "confidence": 0.95,                           of low and high, bootstrap over problems
      "versions": {"multiverse_hf": str, "python": str, "torch": str, ...},
      "hardware": {"device": str, "cores": int, "threads": int, "load_average": float | null} | null,
      "commit": str | null,                         of this package, "-dirty" if files were changed
      "command": str | null,
      "seconds": float, "samples_before": int       of the last command, and its finished samples at start
    }

Metrics are ``pass@1``, ``pass@2``, ``pass@4``, ... up to n, ``avg@n`` (with the number: ``avg@4``), ``parallelism``
(# parallel), ``length`` (positions), ``tokens``, ``steps``, ``well_formed``, ``parallel_rate``, and ``finished``
(share of answers that no limit ended). Tasks of reasoning-gym have ``score`` too, from 0 to 1; an answer with score 1
is right. Each metric is the mean over problems of the mean over a problem's samples; pass@k is the mean of the
problems' unbiased estimates. :mod:`~multiverse_hf.evaluation.metrics` defines them.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import Dtype
from multiverse_hf.errors import CommandError
from multiverse_hf.evaluation.answers import RULES_VERSION
from multiverse_hf.evaluation.metrics import CONFIDENCE, avg_at_n, bootstrap, parallel_rate, pass_at_k
from multiverse_hf.evaluation.run import Finished
from multiverse_hf.evaluation.samples import Sample
from multiverse_hf.evaluation.settings import Evaluation
from multiverse_hf.evaluation.tasks import ProblemSet
from multiverse_hf.judging import gym
from multiverse_hf.judging.checker import JUDGES
from multiverse_hf.provenance import commit, hardware, versions

SCHEMA = 1
PACKAGES = ("sympy", "numpy")
Samples = Sequence[Sample]


def _mean(of: Callable[[Sample], float]) -> Callable[[Samples], float]:
    return lambda samples: sum(of(sample) for sample in samples) / len(samples)


def metrics_of(num_samples: int, has_scores: bool = False) -> dict[str, Callable[[Samples], float]]:
    """Return the metrics of a task by name. Each computes a number from one problem's samples."""

    def pass_at(k: int) -> Callable[[Samples], float]:
        return lambda samples: pass_at_k(len(samples), sum(sample.correct for sample in samples), k)

    powers = [2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples]
    return {
        **{f"pass@{k}": pass_at(k) for k in powers},
        f"avg@{num_samples}": lambda samples: avg_at_n([sample.correct for sample in samples]),
        **({"score": _mean(lambda sample: sample.score)} if has_scores else {}),
        "parallelism": _mean(lambda sample: sample.parallelism),
        "length": _mean(lambda sample: sample.length),
        "tokens": _mean(lambda sample: sample.num_tokens),
        "steps": _mean(lambda sample: sample.num_steps),
        "well_formed": _mean(lambda sample: sample.well_formed),
        "parallel_rate": lambda samples: parallel_rate([sample.num_forks for sample in samples]),
        "finished": _mean(lambda sample: sample.finish_reason == "stop"),
    }


def by_problem(samples: Samples) -> dict[str, list[Sample]]:
    """Return the samples of each problem, by the problem's id."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.id].append(sample)
    return dict(found)


def estimate(samples: Samples, num_samples: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Return every metric of samples of one task, with its interval."""
    problems = by_problem(samples).values()
    has_scores = all(sample.score is not None for sample in samples)
    return {
        name: {key: round(value, 6) for key, value in asdict(bootstrap([of(each) for each in problems], seed)).items()}
        for name, of in metrics_of(num_samples, has_scores).items()
    }


def make_results(finished: Finished, command: str | None = None) -> dict[str, Any]:
    """Return the results of a run; see this module's docstring."""
    evaluation = finished.evaluation
    has_generator = any(each.task.generator for each in finished.problem_sets)
    return {
        "schema": SCHEMA,
        "model": finished.model | ({} if evaluation.dtype is Dtype.AUTO else {"dtype": evaluation.dtype.value}),
        "mode": evaluation.mode.value,
        "prompts": describe_prompts(evaluation),
        "sampling": evaluation.sampling,
        "family": evaluation.family.name,
        "of_record": list(evaluation.of_record),
        "n": evaluation.num_samples,
        "seed": evaluation.seed,
        "tasks": {each.task.name: _describe_task(finished, each) for each in finished.problem_sets},
        "rules_version": RULES_VERSION,
        "confidence": CONFIDENCE,
        "versions": versions(*PACKAGES) | JUDGES | ({"reasoning-gym": gym.VERSION} if has_generator else {}),
        "hardware": None if finished.device is None else hardware(finished.device),
        "commit": commit(),
        "command": command,
        "seconds": round(finished.seconds, 1),
        "samples_before": finished.num_before,
    }


def describe_prompts(evaluation: Evaluation) -> dict[str, str | None]:
    """Return the prompts of record of an evaluation."""
    template = evaluation.mode.suffix.end("{problem}") if evaluation.family.has_suffix else "{problem}"
    return {
        "system_prompt": evaluation.system_prompt,
        "suffix": template.removeprefix("{problem}").lstrip(" "),
        "template": template,
    }


def _describe_task(finished: Finished, problem_set: ProblemSet) -> dict[str, Any]:
    evaluation, task = finished.evaluation, problem_set.task
    samples = [sample for sample in finished.samples if sample.task == task.name]
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.group is not None:
            groups[sample.group].append(sample)
    return {
        "version": task.version,
        "dataset": task.dataset,
        "source": problem_set.source,
        "fingerprint": problem_set.fingerprint,
        "gated": task.is_gated,
        "rule": task.kind.value,
        "options": None if task.generator is None else gym.read_options(task.generator),
        "problems": len(problem_set.problems),
        "samples": len(samples),
        "seen_in_training": finished.num_seen[task.name],
        "limit": evaluation.limit,
        "metrics": estimate(samples, evaluation.num_samples, evaluation.seed),
        "groups": {
            name: {
                "problems": len(by_problem(of)),
                "metrics": estimate(of, evaluation.num_samples, evaluation.seed),
            }
            for name, of in sorted(groups.items())
        },
        "rules": dict(Counter(sample.rule for sample in samples).most_common()),
        "finish_reasons": dict(Counter(sample.finish_reason for sample in samples).most_common()),
    }


def read_results(output: Path) -> dict[str, Any] | None:
    """Return the ``results.json`` of a run, None if there is none.

    Raises:
        CommandError: if the file is invalid.
    """
    path = output / "results.json"
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_bytes())
        if results["schema"] != SCHEMA:
            raise CommandError(
                f"{path} has schema {results['schema']}, and this version reads {SCHEMA}; evaluate again"
            )
        results["tasks"], results["mode"], results["sampling"]  # every results.json has them
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise CommandError(f"{path} is not what multiverse eval writes ({err!r}); evaluate again") from err
    return results
