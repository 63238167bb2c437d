"""Changes to TRL and PEFT, so that they load Multiverse checkpoints as Multiverse models, and to label smoothing.

TRL and PEFT choose a model's class by its name, and would take the plain base class. The functions where they do so
are changed once they are imported, or at once if they are imported already. This module imports neither library.
"""

import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from .labels import IMPOSSIBLE

logger = logging.getLogger(__name__)

_REFERENCES = {"ref_model", "teacher_model"}  # arguments of trainers
_MARK = "_multiverse"  # attribute of what is changed: several copies of this code may be in one process


def multiverse_model(model: Any) -> Any | None:
    """Return the Multiverse model in a model, which may be wrapped by PEFT or DDP; None if there is none."""
    for _ in range(5):
        if hasattr(type(model), "_base_class"):
            return model
        inner = getattr(model, "module", None)  # DDP
        if inner is None and hasattr(model, "get_base_model"):  # PEFT
            inner = model.get_base_model()
        if inner is None:
            return None
        model = inner
    return None


# TRL: models by name, and reference models, which TRL loads by the policy's name


def _change_trl_loader(module: ModuleType, door: Any) -> None:
    """Make ``create_model_from_path`` of TRL load Multiverse checkpoints by the Multiverse class."""
    original = getattr(module, "create_model_from_path", None)
    if original is None:
        logger.warning(
            "this release of TRL has no create_model_from_path: pass it models and reference models as objects, made "
            "with MultiverseForCausalLM.from_pretrained"
        )
        return
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def create_model_from_path(model_id: Any, architecture: Any = None, **kwargs: Any) -> Any:
        if architecture is None:
            caller = sys._getframe(1).f_locals  # of a trainer's __init__; its model is a name before it is loaded
            policy = caller.get("model", getattr(caller.get("self"), "model", None))
            config = getattr(policy, "config", None)
            if str(model_id) == getattr(config, "_name_or_path", None):  # a reference is what its policy is
                policy = multiverse_model(policy)
                if policy is not None:
                    architecture, kwargs["tags"] = door, policy.tags
            elif door.recognizes(model_id):
                architecture = door
        model = original(model_id, architecture, **kwargs)
        if architecture is AutoModelForSequenceClassification and getattr(model.config, "multiverse", None):
            door.adopt(model)
        return model

    setattr(create_model_from_path, _MARK, True)
    for each in list(sys.modules.values()):  # those that took it by name from there
        if getattr(each, "__name__", "").startswith("trl.") and vars(each).get(original.__name__) is original:
            setattr(each, original.__name__, create_model_from_path)


def _change_trl_references(module: ModuleType, door: Any) -> None:
    """Make trainers that are handed a reference or a teacher of the plain class make it one that branches."""
    for kind in list(vars(module).values()):
        own = vars(kind).get("__init__") if isinstance(kind, type) and kind.__module__ == module.__name__ else None
        if own is not None and not hasattr(own, _MARK) and _REFERENCES & inspect.signature(own).parameters.keys():
            kind.__init__ = _adopting(own, door)


def _adopting(original: Callable[..., None], door: Any) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(*args: Any, **kwargs: Any) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        policy = given.get("model")
        by_name = isinstance(policy, str | os.PathLike)
        for name in _REFERENCES & given.keys():
            other = given[name]
            if not isinstance(other, torch.nn.Module) or multiverse_model(other) is not None:
                continue
            if not (door.recognizes(policy) if by_name else multiverse_model(policy)):
                continue
            if getattr(getattr(other, "config", None), "multiverse", None) is None:
                raise ValueError(
                    f"{name} is a {type(other).__name__} without control tags, and the model branches, so that their "
                    "log-probabilities cannot be compared; load it with MultiverseForCausalLM.from_pretrained"
                )
            door.adopt(other)
        original(*args, **kwargs)

    setattr(__init__, _MARK, True)
    return __init__


def _change_trl_rollout(module: ModuleType, door: Any) -> None:
    """Make GRPO and RLOO take each answer at its own length. An answer that is cut off has no end token to tell it."""
    for trainer in ("GRPOTrainer", "RLOOTrainer"):
        kind = vars(module).get(trainer)
        if kind is None:
            continue
        original = vars(kind).get("_generate_single_turn")
        if original is None:
            logger.warning(f"this release of TRL has no {trainer}._generate_single_turn: pass rollout_func")
        elif not hasattr(original, _MARK):
            kind._generate_single_turn = _cut_to_length(original)


def _cut_to_length(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _generate_single_turn(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        model = multiverse_model(trainer.model)
        if model is None:
            return original(trainer, *args, **kwargs)
        if getattr(trainer, "use_vllm", False):
            raise ValueError(
                "use_vllm=True writes paths one after the other, each seeing those before it, and training keeps them "
                "apart; leave it out, so that the model's own generate writes the answers"
            )
        with counted(model) as lengths:
            result = original(trainer, *args, **kwargs)
        completions = result[0] if isinstance(result, tuple) else result
        if len(lengths) == len(completions):  # none were counted where structure="off" was left to transformers
            # TRL's own mask ends at the first end token. Rows without one hold the padding behind them too.
            completions[:] = [ids[: max(1, length)] for ids, length in zip(completions, lengths, strict=True)]
        return result

    setattr(_generate_single_turn, _MARK, True)
    return _generate_single_turn


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Yield a list to which ``model.generate`` adds, inside the context, the number of tokens of each answer."""
    lengths: list[int] = []

    def generate(*args: Any, **kwargs: Any) -> torch.LongTensor:
        output = type(model).generate(model, *args, **(kwargs | {"return_dict_in_generate": True}))
        lengths.extend(stats.num_tokens for stats in getattr(output, "stats", None) or ())  # "off" may have none
        return output.sequences

    own = vars(model).get("generate")
    model.generate = generate
    try:
        yield lengths
    finally:
        del model.generate
        if own is not None:
            model.generate = own


def _change_trl_experimental(module: ModuleType, door: Any) -> None:
    """Make trainers of TRL that load by ``AutoModelForCausalLM`` load by the Multiverse class."""
    _change_trl_references(module, door)
    if vars(module).get("AutoModelForCausalLM") is AutoModelForCausalLM:
        module.AutoModelForCausalLM = _by_name(door)


def _by_name(door: Any) -> Any:
    """Return an ``AutoModelForCausalLM`` that loads Multiverse checkpoints by the Multiverse class."""

    class ByName(AutoModelForCausalLM):
        @classmethod
        def from_pretrained(
            cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
        ) -> Any:
            kind = door if door.recognizes(pretrained_model_name_or_path) else AutoModelForCausalLM
            return kind.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    return ByName


# transformers: the loss of Trainer with label_smoothing_factor


def _change_label_smoother(module: ModuleType, door: Any) -> None:
    """Make ``LabelSmoother`` leave out forced tokens, whose other tokens have the logit of what cannot be."""
    original = module.LabelSmoother.__call__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def __call__(
        smoother: Any, model_output: Any, labels: torch.Tensor, shift_labels: bool = False, **kwargs: Any
    ) -> Any:
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        certain = (logits == IMPOSSIBLE).sum(-1) == logits.shape[-1] - 1
        if shift_labels:
            certain = torch.nn.functional.pad(certain[..., :-1], (1, 0))
        labels = labels.masked_fill(certain.to(labels.device), smoother.ignore_index)
        return original(smoother, model_output, labels, shift_labels, **kwargs)

    setattr(__call__, _MARK, True)
    module.LabelSmoother.__call__ = __call__


# PEFT: the base of an adapter


def _change_peft(module: ModuleType, door: Any) -> None:
    """Make ``AutoPeftModelForCausalLM`` load Multiverse checkpoints by the Multiverse class."""
    kind = getattr(module, "AutoPeftModelForCausalLM", None)
    if getattr(kind, "_target_class", None) is not AutoModelForCausalLM:  # changed before, or another release
        return

    kind._target_class = _by_name(door)
    original = kind.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        model = original(cls, pretrained_model_name_or_path, *args, **kwargs)
        if multiverse_model(model) is None:  # training may have added the tags: the adapter's tokenizer has them then
            hub = {name: kwargs[name] for name in ("revision", "token", "cache_dir") if name in kwargs}
            door.adopt_spelled(model.get_base_model(), pretrained_model_name_or_path, **hub)
        return model

    kind.from_pretrained = classmethod(from_pretrained)
    # An adapter without a task type names the module of its base's class, and peft imports modules that it knows only.
    allowed, package = module.get_default_import_allowlist, door.__module__.rpartition(".")[0]
    module.get_default_import_allowlist = lambda: [*allowed(), package]


def tuned_prompt(model: Any) -> str | None:
    """Return the kind of PEFT adapter that calls ``generate`` with a tuned prompt or prefix; None if none does."""
    caller = getattr(vars(model).get("prepare_inputs_for_generation"), "__self__", model)  # PEFT puts its own there
    config = None if caller is model else getattr(caller, "active_peft_config", None)
    return config.peft_type.value if getattr(config, "is_prompt_learning", False) else None


_CHANGES = {
    "transformers.trainer_pt_utils": _change_label_smoother,
    "trl.trainer.dpo_trainer": _change_trl_references,
    "trl.trainer.kto_trainer": _change_trl_references,
    "trl.trainer.distillation_trainer": _change_trl_references,
    "trl.trainer.utils": _change_trl_loader,
    "trl.trainer.grpo_trainer": _change_trl_rollout,
    "trl.trainer.rloo_trainer": _change_trl_rollout,
    "peft.auto": _change_peft,
}
_EXPERIMENTAL = re.compile(r"trl\.experimental\..*_trainer")


def _change_of(name: str) -> Callable[[ModuleType, Any], None] | None:
    return _CHANGES.get(name) or (_change_trl_experimental if _EXPERIMENTAL.fullmatch(name) else None)


class _Finder:
    """A finder that leaves finding to the others, and changes a module once it is imported."""

    def __init__(self, door: Any) -> None:
        self.door = door
        setattr(self, _MARK, True)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = _change_of(name)
        if change is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                change(module, self.door)

            spec.loader.exec_module = exec_module
        return spec


def integrate(door: Any) -> None:
    """Change the modules that are imported already, and the others when they are. Do nothing after another copy.

    Args:
        door: the class to load Multiverse checkpoints with; its ``recognizes`` says which they are.
    """
    if any(hasattr(finder, _MARK) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder(door))
    for name, module in list(sys.modules.items()):
        if change := _change_of(name):
            change(module, door)
