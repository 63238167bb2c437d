"""GRPO on Multiverse documents: TRL's trainer, with answers from MultiverseEngine on the policy's own weights.

One step: the engine writes all completions in one batch, with branches. It keeps the log-probability of each token
that the model chose. Rewards score the documents. The loss is over the chosen tokens only. Its ratio is the trainer's
probability of a token over the engine's, so that the clipped ratio also corrects a difference between the two.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from multiverse_hf.documents import Document, DocumentError, parse_document
from multiverse_hf.errors import FAILURE, CommandError
from multiverse_hf.modeling.families import Family
from multiverse_hf.modeling.grammar import Structure
from multiverse_hf.modeling.handles import MultiverseResult
from multiverse_hf.modeling.integrations import multiverse_model
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.training.rollouts import encode_prompts, whole_model
from multiverse_hf.training.trees import score_trees, sort_by_prompt

logger = logging.getLogger(__name__)

# What the engine's log-probabilities are of: the model's own distribution.
PLAIN_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
ANSWER_SHAPE = ("parallelism", "length", "num_tokens", "num_forks", "max_width", "depth")
SHORT_PATH = 8  # characters; a shorter path is trivial
OPENING = ("opening_probability", "opening_entropy")
DOCUMENTS = 4  # written at each logging step
READ_DOCUMENTS = 8  # of each rollout, in which the probability of a block is read: a pass without gradients each


def engine_rollout(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
    """Return an answer to each prompt, all written in one batch, in the format of TRL's ``rollout_func``.

    Reward functions get ``document`` (the text with its tags), the measures of its structure, ``malformed``,
    ``trivial`` and ``finish_reason``, one entry for each answer. ``opening_probability`` and ``opening_entropy`` have
    a number for some answers, None for others (:func:`read_openings`).
    """
    tokenizer = trainer.processing_class
    rows = encode_prompts(tokenizer, prompts)
    with whole_model(trainer) as wrapped:
        model = multiverse_model(wrapped)
        was_training = model.training
        model.eval()
        try:
            with MultiverseEngine(model, tokenizer, max_num_seqs=max(1, len(rows))) as engine:
                results = engine.generate(rows, trainer.generation_config, logprobs=0)
            stride = -(-len(results) // READ_DOCUMENTS)  # over all prompts
            openings = [None if n % stride else read_openings(model, result) for n, result in enumerate(results)]
        finally:
            model.train(was_training)
    hidden = set(tokenizer.all_special_ids) - set(model.tags.control_ids)
    documents = [
        tokenizer.decode([i for i in result.ids if i not in hidden], skip_special_tokens=False) for result in results
    ]
    parsed = [_parse(text, model.tags.names) for text in documents]
    return {
        "prompt_ids": rows,
        # TRL reads the last token of each: an empty answer is an end token that the model did not choose
        "completion_ids": [result.ids or [tokenizer.eos_token_id] for result in results],
        "env_mask": [list(map(int, result.sampled)) or [0] for result in results],
        "logprobs": [[0.0 if s is None else s.logprob for s in result.scores] or [0.0] for result in results],
        "document": documents,
        "malformed": [
            tree is None or result.stats.malformed > 0 for tree, result in zip(parsed, results, strict=True)
        ],
        "trivial": [0.0 if tree is None else trivial_share(tree) for tree in parsed],
        "finish_reason": [str(result.stats.finish_reason) for result in results],
        **{name: [getattr(result.stats, name) for result in results] for name in ANSWER_SHAPE},
        **{name: [None if found is None else found[n] for found in openings] for n, name in enumerate(OPENING)},
    }


def read_openings(model: Any, result: MultiverseResult) -> tuple[float, float] | None:
    """Return how likely the model is to open a block, and the entropy, in nats, of what it chooses from there.

    Args:
        model: a Multiverse model.
        result: an answer of its.

    Returns:
        Means over the places where the model chose a token and the grammar allows a block; None without such a place.
    """
    structure, places = Structure(model.tags), []
    for index, token in enumerate(ids := [*result.prompt_ids, *result.ids]):
        chosen = index - len(result.prompt_ids)
        if chosen >= 0 and result.sampled[chosen] and structure.may_open:
            places.append(index - 1)
        structure.feed(token)
    if not places:
        return None
    rows, keep = torch.tensor([ids], device=model.device), torch.tensor(places, device=model.device)
    with torch.no_grad():
        logps = model(input_ids=rows, logits_to_keep=keep, use_cache=False).logits[0].log_softmax(-1)
    opener = model.tags.ids[model.tags.names.opener]
    return logps[:, opener].exp().mean().item(), torch.special.entr(logps.exp()).sum(-1).mean().item()


def _parse(text: str, names: Family) -> Document | None:
    """Return a document; None if it is malformed."""
    try:
        return parse_document(text, names)
    except DocumentError:
        return None


def trivial_share(document: Document) -> float:
    """Return the share of paths that are shorter than ``SHORT_PATH`` characters, or copy an earlier sibling."""
    num_trivial = 0
    for block, _ in document.blocks():
        seen = set()
        for path in block.paths:
            text = re.sub(r"^[\d.]+:", "", Document(path.children, document.tags).render().strip()).strip()
            num_trivial += len(text) < SHORT_PATH or text in seen
            seen.add(text)
    return num_trivial / max(1, document.num_paths)


class MultiverseGRPOTrainer(GRPOTrainer):
    """GRPOTrainer whose completions are documents with branches.

    At each step it logs ``engine/logp_difference_mean`` and ``_max`` (trainer less engine, in nats, absolute) and
    ``engine/ratio_mean``, ``_min`` and ``_max``. These are over the chosen tokens. At the first update after a rollout
    they are the difference of the two computations; later ones include what the updates changed.

    It logs the answers' measures as ``answers/...``, and writes documents to ``documents/step-N.jsonl``. It warns
    when the answers collapse.

    Args:
        stop_on_collapse: end the run there.
        share_prompt: compute what completions of one prompt begin with once. Loss and gradients are the same.
        **kwargs: as for GRPOTrainer, without ``rollout_func``. A reference model is used if ``beta`` is not 0.

    Raises:
        ValueError: if the model is no Multiverse model, or sampling changes the distribution, or experts are balanced
            by tokens that ``share_prompt`` counts once.
    """

    def __init__(self, *args: Any, stop_on_collapse: bool = False, share_prompt: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, rollout_func=engine_rollout, **kwargs)
        if multiverse_model(self.model) is None:
            raise ValueError(
                f"MultiverseGRPOTrainer needs a Multiverse model, got {type(self.model).__name__}; load it with "
                "MultiverseForCausalLM.from_pretrained"
            )
        for name, plain in PLAIN_SAMPLING.items():
            if (value := getattr(self.args, name)) not in (plain, None):
                raise ValueError(
                    f"{name} is {value}, but log-probabilities are of the model's own distribution; leave {name} out"
                )
        if share_prompt and self.aux_loss_enabled:
            raise ValueError(
                "share_prompt counts a shared token once, but the load-balancing loss of experts counts it in each "
                "row; leave out share_prompt, or set router_aux_loss_coef to 0"
            )
        self.stop_on_collapse, self.share_prompt = stop_on_collapse, share_prompt
        self._documents: list[dict[str, Any]] = []
        self._logps: torch.Tensor | None = None  # the trainer's, of the last forward

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``save_pretrained`` writes the model's card, and keeps an existing one."""

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> Any:
        rows = input_ids, attention_mask
        if self.share_prompt:
            tags = multiverse_model(self.model).tags
            with self.accelerator.autocast():
                parts = [
                    score_trees(model, tags, *part, logits_to_keep)
                    for part in zip(*(each.split(batch_size or len(each)) for each in rows), strict=True)
                ]
            logps, entropies = zip(*parts, strict=True)
            scores = torch.cat(logps), torch.cat(entropies) if compute_entropy else None, None
        else:
            scores = super()._get_per_token_logps_and_entropies(
                model, *rows, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        self._logps = scores[0].detach()
        return scores

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self.share_prompt and self._buffered_inputs is not before:
            self._buffered_inputs = sort_by_prompt(self._buffered_inputs)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        # TRL corrects for the sampler only with vLLM. With the engine's values here, its clipped ratio does it.
        batch["old_per_token_logps"] = batch["sampling_per_token_logps"]
        names = ("prompt", "document", "answer", "malformed", "trivial", "finish_reason", *ANSWER_SHAPE, *OPENING)
        rows = gather_object([{name: row[name] for name in names if name in row} for row in inputs])
        self._documents = rows[:DOCUMENTS]
        measures = {name: [row[name] for row in rows] for name in (*ANSWER_SHAPE, "malformed", "trivial")}
        measures["forking"] = [row["num_forks"] > 0 for row in rows]
        measures |= {name: [row[name] for row in rows if row[name] is not None] for name in OPENING}
        for name, values in measures.items():
            if not values:  # no document with a place for a block
                continue
            mode = "train" if self.model.training else "eval"
            self._metrics[mode][f"answers/{name}"].append(sum(map(float, values)) / len(values))
        return batch

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        chosen = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        difference = (self._logps - inputs["sampling_per_token_logps"])[chosen].float()
        mode, gather = "train" if self.model.training else "eval", self.accelerator.gather
        if len(difference) == 0:  # every answer is empty or cut off and masked
            difference = torch.zeros(1, device=loss.device)
        ratio = difference.exp()
        for name, value, join in (
            ("logp_difference_mean", difference.abs().mean(), torch.mean),
            ("logp_difference_max", difference.abs().max(), torch.max),
            ("ratio_mean", ratio.mean(), torch.mean),
            ("ratio_min", ratio.min(), torch.min),
            ("ratio_max", ratio.max(), torch.max),
        ):
            self._metrics[mode][f"engine/{name}"].append(join(gather(value)).item())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "answers/forking" not in logs:
            return
        if self.is_world_process_zero():
            file = Path(self.args.output_dir, "documents", f"step-{self.state.global_step}.jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._documents]
            file.write_text("".join(lines), encoding="utf-8")
        first = next(entry for entry in self.state.log_history if "answers/forking" in entry)
        if collapse := find_collapse(first, logs):
            message = f"step {self.state.global_step}: the answers collapse: {'; '.join(collapse)}"
            if self.stop_on_collapse:
                raise CommandError(f"{message}; see {self.args.output_dir}/documents", FAILURE)
            logger.warning(message)


def find_collapse(first: dict[str, float], now: dict[str, float]) -> list[str]:
    """Return what shows that answers collapse, in words with numbers.

    Args:
        first: the log of the first step.
        now: the log of this step.
    """
    (began, forking), (short, length) = (
        (first[f"answers/{name}"], now[f"answers/{name}"]) for name in ("forking", "length")
    )
    signs = {
        f"{forking:.0%} fork, {began:.0%} at the start": began >= 0.1 and forking < began / 10,
        f"all fork, {began:.0%} at the start": began <= 0.9 and forking == 1,
        f"{now['answers/trivial']:.0%} of the paths are empty or copies": now["answers/trivial"] > 0.5,
        f"length {length:.0f}, {short:.0f} at the start": length > 3 * short,
    }
    return [text for text, is_so in signs.items() if is_so]
