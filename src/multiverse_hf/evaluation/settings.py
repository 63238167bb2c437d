"""What a user asks of an evaluation, and whether it is what a folder was begun with."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import Attention, Checkpoint, Dtype
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.evaluation.answers import RULES_VERSION
from multiverse_hf.evaluation.tasks import (
    MAX_NEW_TOKENS,
    MAX_NUM_SEQS,
    TASKS,
    TEMPERATURE,
    TOP_P,
    Mode,
    Problem,
    ProblemSet,
)
from multiverse_hf.outputs import write_output


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a user asks for.

    Attributes:
        model: folder or repository; None for the embedded model.
        revision: of a repository.
        tasks: names.
        mode: how the model is asked.
        data_dir: folder with local rows; None for the Hub.
        limit: problems of each task, from the first on; None for all.
        num_samples: answers to each problem.
        seed: of all noise. Answer k of a problem has noise of this seed and k, so two runs that differ in nothing but
            their batches give the same answers.
        temperature: 0 takes the likeliest token.
        top_p: draw among the likeliest tokens that have this much probability together.
        max_new_tokens: bounds the length: positions past the prompt, not the tokens of all paths.
        system_prompt: before each problem; the record has none.
        dtype, attention, device, threads: as for :func:`~multiverse_hf.checkpoints.load_model`.
        max_num_seqs, max_cache_tokens: of the engine.
    """

    model: str | None
    tasks: tuple[str, ...]
    mode: Mode = Mode.PARALLEL
    revision: str = "main"
    data_dir: Path | None = None
    limit: int | None = None
    num_samples: int = 1
    seed: int = 0
    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    max_new_tokens: int = MAX_NEW_TOKENS
    system_prompt: str | None = None
    dtype: Dtype = Dtype.AUTO
    attention: Attention = Attention.SDPA
    device: str = "auto"
    threads: int | None = None
    max_num_seqs: int = MAX_NUM_SEQS
    max_cache_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check what fits together.

        Raises:
            CommandError: if a task is unknown, or greedy answers are asked for more than once.
        """
        for name in self.tasks:
            if name not in TASKS:
                close = difflib.get_close_matches(name, TASKS, 1, cutoff=0.3)
                hint = f"did you mean {close[0]}? " if close else ""
                raise CommandError(f"no task {name!r}; {hint}there are {', '.join(TASKS)}")
        if not self.tasks:
            raise CommandError(f"no task was named; there are {', '.join(TASKS)}")
        if self.temperature == 0 and self.num_samples > 1:
            raise CommandError(
                f"{self.num_samples} greedy answers to a problem would all be the same; give --temperature, or --n 1"
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of the engine, all of them said: a checkpoint's generation config may hold others."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature else {}
        return {
            "do_sample": self.temperature > 0,
            **drawn,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "max_new_tokens": self.max_new_tokens,
            "structure": self.mode.structure,
        }

    def messages(self, problem: Problem) -> str | list[dict[str, str]]:
        """Give what the model is asked."""
        prompt = problem.prompt(self.mode)
        if self.system_prompt is None:
            return prompt
        return [{"role": "system", "content": self.system_prompt}, {"role": "user", "content": prompt}]


# May differ when a run is gone on with: they do not change an answer.
HOW = ("device", "threads", "max_num_seqs", "max_cache_tokens", "data_dir", "model")


def settle(
    path: Path, evaluation: Evaluation, checkpoint: Checkpoint, weights: str, problem_sets: Sequence[ProblemSet]
) -> None:
    """Write down what a run is begun with, or check that it is the one that was begun here.

    Raises:
        CommandError: if the folder is another run's.
    """
    asked = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(evaluation).items()
        if name not in HOW
    }
    asked |= {
        "weights": weights,
        "rules_version": RULES_VERSION,
        "problems": {each.task.name: each.fingerprint for each in problem_sets},
    }
    if not path.exists():
        if any((path.parent / "samples").glob("*.parquet")):
            raise CommandError(f"{path.parent} holds samples, but no run.json; name another folder")
        write_output(path, json.dumps(asked | {"model": checkpoint.name}, indent=2, ensure_ascii=False) + "\n")
        return
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError) as err:
        raise CommandError(f"cannot read {path}: {one_line(err)}; name another folder") from err
    if not isinstance(stored, dict):
        raise CommandError(f"cannot read {path}: it holds no object; name another folder")
    for name, value in asked.items():
        if value == (there := stored.get(name)):
            continue
        if name == "rules_version":
            raise CommandError(
                f"{path.parent} was judged by version {there or 1} of the rules for answers, this is version {value}; "
                "name another --output"
            )
        way_out = "give the same again to go on, or another --output"
        if name == "weights":
            raise CommandError(f"{path.parent} was begun with another model ({stored.get('model')}); {way_out}")
        if name == "problems":
            raise CommandError(f"{path.parent} was begun with other problems; {way_out}")
        option = {"num_samples": "n", "tasks": "task"}.get(name, name.replace("_", "-"))
        raise CommandError(f"{path.parent} was begun with --{option} {there}, now it is {value}; {way_out}")
