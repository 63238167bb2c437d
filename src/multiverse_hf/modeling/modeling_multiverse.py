"""``MultiverseForCausalLM``: any rotary softmax decoder of transformers, with a forward and a generate that branch."""

import copy
import functools
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .attention import LayoutHook, layer_kinds
from .generation import MultiverseGenerateOutput, generate
from .tags import TagNames, TagSet


class MultiverseMixin:
    """What a Multiverse model adds to its base class: the layout at the backbone, and branching generation."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.tags = TagSet.from_dict(config.multiverse)
        self.base_model.register_forward_pre_hook(LayoutHook(self.tags), with_kwargs=True)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        streamer: Any | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> torch.LongTensor | MultiverseGenerateOutput:
        """Answer prompts; where the model writes a block, its paths are written at the same time.

        Takes what ``generate`` of transformers takes for greedy decoding and sampling, and besides:

        Args:
            inputs: (B, L) token ids, also as ``input_ids``; left-padded where ``attention_mask`` says so.
            generation_config: as in transformers; may hold the structure options too.
            logits_processor: see each branch's own visible ids in document order, as on a lone sequence.
            stopping_criteria: likewise; outside every block they end the answer, inside a path they close it. They are
                not asked at a token that forks or closes a path.
            streamer: receives the document in document order, as early as it is settled; or, if it has a method
                ``on_event``, every :class:`~.state.BranchEvent` instead. One prompt only.
            seed: of the sampling noise, which is keyed by (seed, prompt, branch, position): an answer does not
                depend on what it was batched with. By default drawn from torch's generator.
            **kwargs: ``structure`` ("guided", "lenient" or "off"), ``max_new_tokens`` (bounds the length: positions,
                not tokens), ``max_total_tokens``, ``max_path_tokens``, ``max_depth``, ``max_paths``, and the options
                of ``GenerationConfig``: ``do_sample``, ``temperature``, ``num_return_sequences``,
                ``return_dict_in_generate``, ``output_logits``, ``max_time``, ...

        Returns:
            (B, L) token ids, documents with their paths one after the other; with ``return_dict_in_generate`` a
            :class:`~.generation.MultiverseGenerateOutput`.

        Raises:
            ValueError: if an option is unknown or out of range, a mode cannot branch, or a prompt is empty or does
                not fit the context.
        """
        return generate(self, inputs, generation_config, logits_processor, stopping_criteria, streamer, seed, kwargs)


@functools.cache
def multiverse_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Give the Multiverse class of a causal-LM class. Made once per base.

    It bears the base's own name: ``save_pretrained`` writes the class's name into ``architectures``, and a checkpoint
    must stay one of its base architecture for every loader that does not know Multiverse.
    """
    return type(base.__name__, (MultiverseMixin, base), {"__module__": __name__, "__doc__": MultiverseMixin.__doc__})


def base_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Give the causal-LM class of transformers that a config names.

    Raises:
        ValueError: if Multiverse cannot serve that architecture, with the reason.
    """
    name = config.model_type
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; Multiverse needs a decoder-only model such as qwen3 or llama")
    base = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if base is None:
        raise ValueError(f"transformers has no causal language model for {name}; choose a decoder-only text model")
    if getattr(base, "_is_stateful", False):
        raise ValueError(
            f"{name} keeps a recurrent state, which paths cannot share and merge; choose a softmax decoder"
        )
    layer_kinds(config)
    has_rotary = (
        getattr(config, "rope_parameters", None) is not None or getattr(config, "rope_theta", None) is not None
    )
    if not has_rotary or getattr(config, "alibi", False):
        raise ValueError(
            f"{name} has no rotary positions; Multiverse lets several tokens stand at one position, which needs them"
        )
    return base


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Find the class of a pickled model again, by its base's name."""
    for base in MODEL_FOR_CAUSAL_LM_MAPPING.values() if name.endswith("ForCausalLM") else ():
        if isinstance(base, type) and base.__name__ == name:
            return multiverse_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _with_tags(config: PretrainedConfig, tags: TagSet | None) -> PretrainedConfig:
    """Give a copy of a config that holds the tags.

    Raises:
        ValueError: if the model has no embeddings for them.
    """
    config = copy.deepcopy(config)
    if tags is not None:
        config.multiverse = tags.to_dict()
    highest = max(TagSet.from_dict(config.multiverse).control_ids)
    if highest >= config.vocab_size:
        raise ValueError(
            f"the tags go up to id {highest} and the embeddings to {config.vocab_size - 1}; "
            "resize the embeddings and train the model on tags"
        )
    return config


class MultiverseForCausalLM:
    """Door to the Multiverse classes, used like ``AutoModelForCausalLM``.

    The class is made for the architecture the config names; the checkpoint stays an ordinary one of that architecture.
    """

    def __init__(self) -> None:
        raise OSError("use MultiverseForCausalLM.from_pretrained(path) or MultiverseForCausalLM.from_config(config)")

    @classmethod
    def from_config(cls, config: PretrainedConfig, tags: TagSet | None = None, **kwargs: Any) -> PreTrainedModel:
        """Make a model with random weights.

        Args:
            config: the base architecture's config.
            tags: the control tags; may be left out if the config holds them.
            **kwargs: as for ``AutoModelForCausalLM.from_config``: ``dtype``, ``attn_implementation``.

        Raises:
            ValueError: if the architecture cannot branch, or no tags are known.
        """
        model_class = multiverse_class(base_class(config))
        if tags is None and getattr(config, "multiverse", None) is None:
            raise ValueError("the config holds no tag set; pass tags=TagSet.from_tokenizer(tokenizer)")
        return model_class._from_config(_with_tags(config, tags), **kwargs)

    @classmethod
    def from_pretrained(
        cls, path: str, *args: Any, tags: TagSet | None = None, names: TagNames | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a checkpoint from a folder or the Hub.

        Args:
            path: folder or repository id, of a Multiverse checkpoint or of a base model whose tokenizer has the tags.
            tags: the control tags; by default those the config holds, else those the tokenizer beside it has.
            names: how the tokenizer spells the tags, if it is none of the presets.
            *args, **kwargs: as for ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            ValueError: if the architecture cannot branch, or the tokenizer has no tags.
            OSError: if there is no checkpoint at ``path``.
        """
        hub = {
            k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder") if k in kwargs
        }
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path, **hub)
        model_class = multiverse_class(base_class(config))
        if tags is None and getattr(config, "multiverse", None) is None:
            tags = TagSet.from_tokenizer(AutoTokenizer.from_pretrained(path, **hub), names)
        return model_class.from_pretrained(path, *args, config=_with_tags(config, tags), **kwargs)
