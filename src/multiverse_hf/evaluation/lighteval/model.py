"""The adapter for ``lighteval custom``: answers come from the engine, all problems at once.

    lighteval custom "multiverse-tiny,temperature=0" src/multiverse_hf/evaluation/lighteval/model.py "mv:chains|0" \\
        --custom-tasks multiverse_hf.evaluation.lighteval.tasks --output-dir out --save-details

``lighteval custom`` has no options for models. They follow the model's name after commas: ``temperature``, ``top_p``,
``seed``, ``max_new_tokens``, ``max_num_seqs``, ``max_cache_tokens``, ``dtype``, ``device``, ``threads``, ``revision``,
``system_prompt``. The defaults are those of ``multiverse eval``; ``multiverse`` alone is the embedded model.

LightEval takes the first ``LightevalModel`` in this file, so there is only one.
"""

import dataclasses
import difflib
from typing import Any

from lighteval.models.abstract_model import LightevalModel
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.requests import Doc
from lighteval.utils.cache_management import SampleCache

from multiverse_hf.checkpoints import Dtype, load_model, open_checkpoint
from multiverse_hf.evaluation.lighteval.measures import MEASURES
from multiverse_hf.evaluation.run import Trial, answer_trials, sample_seed
from multiverse_hf.evaluation.settings import Evaluation
from multiverse_hf.evaluation.task_files import find_task
from multiverse_hf.evaluation.tasks import TASKS, Instance, Mode, Task

MODEL_OPTIONS: dict[str, Any] = {
    "temperature": float,
    "top_p": float,
    "seed": int,
    "max_new_tokens": int,
    "max_num_seqs": int,
    "max_cache_tokens": int,
    "dtype": Dtype,
    "device": str,
    "threads": int,
    "revision": str,
    "system_prompt": str,
}
MEASURED = ("num_tokens", "length", "parallelism", "num_steps", "num_forks")


def read_name(text: str) -> tuple[str | None, dict[str, Any]]:
    """Return name and options of ``NAME,option=value,...``.

    Raises:
        ValueError: if an option is unknown, or its value is invalid.
    """
    name, *pairs = text.split(",")
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in MODEL_OPTIONS or not equals:
            close = difflib.get_close_matches(key, MODEL_OPTIONS, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"no option {pair!r} after the model's name; {hint}there are {', '.join(MODEL_OPTIONS)}")
        try:
            options[key] = MODEL_OPTIONS[key](value)
        except ValueError as err:
            raise ValueError(f"{key} takes {MODEL_OPTIONS[key].__name__}, got {value!r}") from err
    return None if name == "multiverse" else name, options


class MultiverseLightevalModel(LightevalModel):
    """A model of this library, as LightEval sees it."""

    def __init__(self, config: Any) -> None:
        name, options = read_name(config.model_name)
        self.evaluation = Evaluation(name, tuple(TASKS), **options)
        # without tags it answers only autoregressive tasks; greedy_until checks that
        self.checkpoint = open_checkpoint(name, self.evaluation.revision, needs_tags=False)
        evaluation = self.evaluation = self.evaluation.of(self.checkpoint.tags.names)
        self.model = load_model(
            self.checkpoint, evaluation.dtype, evaluation.attention, evaluation.device, evaluation.threads
        )
        # LightEval turns the name into folders: an absolute name would put results into the model's folder
        self.config = config.model_copy(update={"model_name": self.checkpoint.name.strip("/").replace("/", "--")})
        self._cache = SampleCache(self.config)  # not used: it identifies models by name, not by weights

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.checkpoint.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        """Whether LightEval adds special tokens: no, the chat template does."""
        return False

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.checkpoint.config.max_position_embeddings

    def greedy_until(self, docs: list[Doc]) -> list[ModelResponse]:
        """Answer documents, all of one mode at once.

        Raises:
            ValueError: if the model cannot answer in a task's mode.
        """
        responses: dict[int, ModelResponse] = {}
        for mode in Mode:
            of_mode = [(number, doc) for number, doc in enumerate(docs) if doc.specific["mode"] == mode.value]
            if of_mode:
                responses |= self._answer(mode, of_mode)
        return [responses[number] for number in range(len(docs))]

    def _answer(self, mode: Mode, docs: list[tuple[int, Doc]]) -> dict[int, ModelResponse]:
        """Answer the documents of a mode. The tasks' budgets limit the model's own."""
        if mode is not Mode.AUTOREGRESSIVE and not self.checkpoint.has_tags:
            raise ValueError(
                f"{self.checkpoint.name} has no control tags and cannot branch; "
                "ask it tasks that end in :autoregressive"
            )
        budgets = {doc.generation_size for _, doc in docs if doc.generation_size is not None}
        budget = min([self.evaluation.max_new_tokens, *budgets])
        evaluation = dataclasses.replace(self.evaluation, mode=mode, max_new_tokens=budget)
        trials = [
            Trial(_task(doc), Instance(str(number), doc.query, doc.choices[0]), sample,
                sample_seed(evaluation.seed, sample))
            for number, doc in docs
            for sample in range(doc.num_samples)
        ]  # fmt: skip
        answers = {
            (int(each.trial.problem.id), each.trial.sample): each
            for each in answer_trials(evaluation, self.checkpoint, self.model, trials)
        }
        responses = {}
        for number, doc in docs:
            of_doc = [answers[number, sample] for sample in range(doc.num_samples)]
            doc.specific[MEASURES] = [{name: getattr(each.stats, name) for name in MEASURED} for each in of_doc]
            responses[number] = ModelResponse(
                input=doc.query,
                text=[each.document for each in of_doc],
                output_tokens=[each.ids for each in of_doc],
            )
        return responses

    def loglikelihood(self, docs: list[Doc]) -> list[ModelResponse]:
        """Raise: this adapter only generates."""
        raise NotImplementedError("this adapter generates; for log-likelihoods use lighteval accelerate")

    def loglikelihood_rolling(self, docs: list[Doc]) -> list[ModelResponse]:
        """Raise: this adapter only generates."""
        raise NotImplementedError("this adapter generates; for perplexities use lighteval accelerate")


def _task(doc: Doc) -> Task:
    """Return the task of a document, whose ``task_name`` is such as ``mv:math_500:zero|0``."""
    return find_task(doc.specific["generated"] or ":".join(doc.task_name.partition("|")[0].split(":")[:2]))
