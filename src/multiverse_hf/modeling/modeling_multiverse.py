"""``MultiverseForCausalLM``: any rotary softmax decoder of transformers, with a forward and a generate that branch."""

from .requirements import TRANSFORMERS  # noqa: F401 - first: what an older transformers lacks, others import

# isort: split
import functools
import os
from typing import Any

import torch
import transformers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    StoppingCriteriaList,
)

from .arguments import asked_structure, check_streamer, needs_base, read_callables, reject
from .attention_chunked import CHUNKED
from .callables import is_callers
from .configuration_multiverse import MultiverseConfig
from .families import Family, read_family
from .generation import MultiverseGenerateOutput, generate, generate_plain
from .gguf_files import gguf_options, reading, split_path
from .hooks import ForcedTokenHooks, execution_device, follow_layout, follow_layouts, hooked_forward
from .integrations import integrate, tuned_prompt
from .layout import is_plain
from .loading import (
    HUB,
    adapter_base,
    base_class,
    check_tokenizer,
    load_with_peft,
    read_config,
    spelled_tags,
    spells_tags,
    warn_of_missing_code,
    with_tags,
)
from .remote_code import AUTO_MAP, replace_empty_card, state_structure, write_code
from .tags import TagSet


class MultiverseForCausalLM:
    """A causal LM of transformers that branches; the door to it is used like ``AutoModelForCausalLM``.

    :meth:`from_pretrained` and :meth:`from_config` make the class for the architecture the config names: a subclass of
    this one and of the base class (:func:`multiverse_class`). This one adds the layout at the backbone, and branching
    generation; the checkpoint stays an ordinary one of its architecture.
    """

    _base_class: type[PreTrainedModel]  # of a class that was made: the class of transformers beneath it
    # Forced tokens have probability one in the logits of a document; True leaves the network's own logits there.
    raw_forced_logits: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if type(self) is MultiverseForCausalLM:
            raise OSError(
                "use MultiverseForCausalLM.from_pretrained(path) or MultiverseForCausalLM.from_config(config)"
            )
        super().__init__(*args, **kwargs)
        if self.config._attn_implementation == CHUNKED and not self._supports_sdpa:  # as transformers does for sdpa
            raise ValueError(
                f"{self.config.model_type} does not support sdpa, which attn_implementation={CHUNKED!r} is made of; "
                "use attn_implementation='eager' or 'flex_attention'"
            )
        self._follow_layouts()

    def _follow_layouts(self) -> None:
        self.tags = TagSet.from_dict(getattr(self.config, "multiverse", None))
        follow_layouts(self, self.tags)

    @property
    def device(self) -> torch.device:
        """Where the model computes: of a model that accelerate offloads, not the meta device of its weights."""
        device = super().device
        return (execution_device(self) or device) if device.type == "meta" else device

    @classmethod
    def adopt(cls, model: PreTrainedModel) -> PreTrainedModel:
        """Make a model of transformers' own class, whose config holds the tags, one that branches; in place.

        Of a backbone, or of a model with another head such as a reward model's, the backbone follows the layout then.

        Raises:
            ValueError: if its architecture cannot branch, or its config holds no tags.
        """
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT's own is around it
        if hasattr(type(inner), "_base_class"):  # it branches already
            return model
        base, tags = base_class(inner.config), TagSet.from_dict(getattr(inner.config, "multiverse", None))
        if isinstance(inner, base):
            inner.__class__ = multiverse_class(base)
            inner._follow_layouts()
        else:
            follow_layout(inner.base_model, tags)
        return model

    @classmethod
    def over(cls, model: PreTrainedModel) -> PreTrainedModel:
        """Return a model that branches with the modules of ``model``, which keeps its class and its ``forward``.

        Raises:
            ValueError: if its architecture cannot branch, or its config holds no tags.
        """
        made = multiverse_class(base_class(model.config))
        view = made.__new__(made)
        view.__dict__.update({name: value for name, value in vars(model).items() if name != "generate"})
        view.tags = TagSet.from_dict(getattr(model.config, "multiverse", None))
        view._forced_token_hooks = ForcedTokenHooks(made, view.tags)
        return view

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the checkpoint's ``custom_generate``: this class has its own ``generate``."""
        raise OSError("this model branches by itself")

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Answer as the base class does: transformers looks into the file a class is from, and a mixture of experts
        would otherwise run expert by expert."""
        return cls._base_class._can_set_experts_implementation()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save an ordinary checkpoint of the base architecture, and the code that makes it branch elsewhere.

        Takes what ``save_pretrained`` of transformers takes. ``AutoModelForCausalLM.from_pretrained(save_directory,
        trust_remote_code=True)`` then branches with nothing but torch and transformers installed.
        """
        self.config.auto_map = dict(AUTO_MAP)
        if getattr(self, "generation_config", None) is not None:
            state_structure(self.generation_config, self.tags.names)
        if kwargs.get("is_main_process", True):  # first, so that push_to_hub=True finds the files
            write_code(save_directory, self._base_class.__name__)
        super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_modified_files(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload what ``push_to_hub`` has saved."""
        replace_empty_card(working_dir, repo_id, self._base_class.__name__)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """Take the call of ``AutoModelForCausalLM.from_config``."""
        if cls is not MultiverseForCausalLM:
            return super()._from_config(config, **kwargs)
        return cls.from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModelForCausalLM") -> None:
        """Take the call that ``AutoModelForCausalLM`` makes to a class which came with a checkpoint as its code."""
        if cls is not MultiverseForCausalLM:
            super().register_for_auto_class(auto_class)

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
        return model_class._from_config(with_tags(config, tags), **kwargs)

    @classmethod
    def recognizes(cls, path: str | os.PathLike[str]) -> bool:
        """Return whether a checkpoint is a Multiverse model: its config or its tokenizer holds the control tags.

        Reads no weights. False for what cannot be read: loading it raises.
        """
        try:
            config = MultiverseConfig.from_pretrained(path)
            if getattr(config, "multiverse", None) is not None:
                return True
            return spells_tags(config, path, {})
        except Exception:  # transformers raises errors of many kinds here
            return False

    @classmethod
    def adopt_spelled(cls, model: PreTrainedModel, path: str | os.PathLike[str], **hub: Any) -> PreTrainedModel:
        """Adopt a model of transformers' own class if the tokenizer at ``path`` has the tags; else leave it.

        Args:
            model: changed in place.
            path: folder or repository of a tokenizer, such as that of an adapter for the model.
            **hub: where to read it: ``revision``, ``token``, ...
        """
        if not spells_tags(model.config, path, hub):
            return model
        model.config.multiverse = TagSet.from_tokenizer(AutoTokenizer.from_pretrained(path, **hub)).to_dict()
        return cls.adopt(model)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None,
        *args: Any,
        config: PretrainedConfig | str | os.PathLike[str] | None = None,
        tags: TagSet | None = None,
        family: Family | str | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load a checkpoint from a folder or the Hub.

        Args:
            pretrained_model_name_or_path: folder or repository id, of a Multiverse checkpoint, of a base model whose
                tokenizer has the tags, or of an adapter for one of these (with peft installed, as in transformers).
                ``folder/FILE.gguf`` and ``owner/name/FILE.gguf`` stand for ``gguf_file``.
            *args: as for ``AutoModelForCausalLM.from_pretrained``.
            **kwargs: as for ``AutoModelForCausalLM.from_pretrained``; what the config has a place for, such as
                ``use_cache`` or ``attention_dropout``, goes there. With ``output_loading_info=True`` a checkpoint that
                lacks weights is loaded all the same, and the info says which. Weights that the model has no place for
                are passed over, and transformers reports them. Weights of a ``gguf_file`` are dequantized, unless
                ``quantization_config`` is a ``GgufConfig``; only dequantized, they can be saved and trained.
            config: in place of the checkpoint's own, or where to read it.
            tags: the control tags; by default those the config holds, else those the tokenizer beside it has.
            family: the family of the tags, or its name; by default that of the config, else the first known one whose
                tags the tokenizer has.

        Raises:
            ValueError: if the architecture cannot branch, the tokenizer has no tags or other ids for them than the
                config, or weights are missing.
            OSError: if there is no checkpoint at that place, or its GGUF file cannot be read.
        """
        family = None if family is None else read_family(family)
        path, gguf_file = pretrained_model_name_or_path, kwargs.get("gguf_file")
        if gguf_file is None:
            path, gguf_file = split_path(path)
        kwargs |= {name: value for name, value in gguf_options(gguf_file).items() if kwargs.get(name) is None}
        is_made = cls is not MultiverseForCausalLM
        if is_made and tags is None and family is None:  # its base knows how
            with reading(path, gguf_file, NotImplementedError):
                loaded = super().from_pretrained(path, *args, config=config, **kwargs)
            if gguf_file is not None:  # an adapter's config names its base by this
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                model.name_or_path = model.config.name_or_path = os.path.join(path, gguf_file)
            return loaded
        hub = {name: kwargs[name] for name in HUB if name in kwargs}
        is_given = isinstance(config, PretrainedConfig)
        base = path if path is None and is_given else adapter_base(path, hub) or path
        if base != path and split_path(base)[1] is not None:
            raise ValueError(
                f"{path} is an adapter of the GGUF file {base}; put the two together: "
                f"multiverse merge --adapter {path} --output FOLDER"
            )
        if not is_given:
            config, kwargs = read_config(base if config is None else config, hub, kwargs)
        model_class = cls if is_made else multiverse_class(base_class(config))
        stored = getattr(config, "multiverse", None)
        if tags is None and stored is None:
            tags = spelled_tags(path, base, hub, family, gguf_file)
        warn_of_missing_code(base, config)
        config = with_tags(config, tags)
        used = TagSet.from_dict(config.multiverse)
        if family is not None and used.names.tokens != family.tokens:
            raise ValueError(
                f"the checkpoint's tags are {', '.join(used.names.tokens)}, not those of family {family.name}; leave "
                "family out"
            )
        if config.multiverse == stored and base is not None:
            check_tokenizer(used, base, hub)
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            model, info = model_class.from_pretrained(path, *args, config=config, output_loading_info=True, **kwargs)
        except (ValueError, NotImplementedError) as err:
            if base == path:
                raise
            raise ValueError(
                f"{path} is an adapter that transformers cannot load by itself ({err}); use "
                "peft.AutoPeftModelForCausalLM.from_pretrained, which loads its base as a Multiverse model"
            ) from err
        if base != path and info["missing_keys"]:
            info["missing_keys"] = load_with_peft(model, path, hub, info["missing_keys"])
        if wants_info:
            return model, info
        if (missing := sorted(info["missing_keys"])) and "state_dict" not in kwargs:
            raise ValueError(
                f"{path} lacks {len(missing)} weights of {model_class.__name__}, {missing[0]} among them, which would "
                "be random; save the whole model again, or pass output_loading_info=True to see what is there"
            )
        return model

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
            inputs: (B, L) token ids, also as ``input_ids``; padded where ``attention_mask`` says so.
            generation_config: as in transformers; may hold the structure options too.
            logits_processor: transformers' own see each branch's visible ids in document order, as on a lone sequence.
                Any others are called once a step with the whole padded batch, as by transformers. Once a row forks,
                each of its branches has a copy of its own (:mod:`~.callables`).
            stopping_criteria: likewise; outside every block they end the answer, inside a path they close it, or
                with ``stop_scope="answer"`` end the answer. They are not asked at a token that forks or closes a path.
            streamer: receives the document in document order, as early as it is settled; or, if it has a method
                ``on_event``, every :class:`~.state.BranchEvent` instead. One prompt only.
            seed: of the sampling noise, which is keyed by (seed, prompt, branch, position): an answer does not
                depend on what it was batched with. By default drawn from torch's generator.
            **kwargs: ``structure`` ("guided", "lenient", or "off" for ordinary decoding: what the engine does not do
                there, such as beams, scores, static caches and assistants, transformers' own ``generate`` does),
                ``max_new_tokens`` (bounds the length: positions, not tokens), ``max_total_tokens``,
                ``max_path_tokens``, ``max_depth``, ``max_paths``, ``max_branches``, ``stop_scope``, ``speculate``;
                None is the default, whatever the checkpoint's generation config says. And the options of
                ``GenerationConfig``: ``do_sample``, ``temperature``, ``num_return_sequences``,
                ``return_dict_in_generate``, ``output_logits``, ``max_time``, ...; :mod:`~.arguments` says of each what
                becomes of it.

        Returns:
            (B, L) token ids, documents with their paths one after the other; with ``return_dict_in_generate`` a
            :class:`~.generation.MultiverseGenerateOutput`.

        Raises:
            ValueError: if an option is unknown or out of range, a mode cannot branch, or a prompt is empty or does
                not fit the context.
            TypeError: if an argument is of the wrong kind.
        """
        check_streamer(streamer)
        if isinstance(kwargs.get("custom_generate"), str) and kwargs["custom_generate"] == self.name_or_path:
            del kwargs["custom_generate"]  # the checkpoint's own function is this one
        tuned, arguments = tuned_prompt(self), (inputs, generation_config, logits_processor, stopping_criteria)
        structure = "off" if is_plain() else asked_structure(self, generation_config, kwargs)
        if tuned and structure != "off":
            raise ValueError(
                f"{tuned} brings vectors beside the tokens, which branches do not read; call generate with "
                "structure='off', or train LoRA"
            )
        own = read_callables(logits_processor, "logits_processor")
        own = any(map(is_callers, own + read_callables(stopping_criteria, "stopping_criteria")))
        no_prompt = inputs is None and kwargs.get("input_ids") is None  # transformers begins with the bos token
        for_base = tuned or is_plain() or own or no_prompt or needs_base(self, generation_config, kwargs)
        if structure == "off" and for_base:
            return generate_plain(self, super().generate, *arguments, streamer, seed, kwargs)
        return generate(self, inputs, generation_config, logits_processor, stopping_criteria, streamer, seed, kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse transformers' own continuous batching, which ``generate_batch`` and ``transformers serve
        --continuous-batching`` begin with: it would write one branch, and say nothing.

        Raises:
            ValueError: with the way out.
        """
        reject(True, "transformers' continuous batching", "use MultiverseEngine, or generate with a batch of prompts")

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickle by the base class: a class that was made cannot be imported by its name."""
        if type(self) is not multiverse_class(self._base_class):  # somebody's own subclass
            return super().__reduce_ex__(protocol)
        return _blank, (self._base_class,), self.__dict__


class MultiverseModel:
    """The backbone of a Multiverse model: what ``AutoModel`` gives, following the layout of the ids it is given."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Take the call that ``AutoModel`` makes to a class which came with a checkpoint as its code."""

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> PreTrainedModel:
        """Take the call of ``AutoModel.from_config``."""
        return MultiverseForCausalLM.from_config(config, **kwargs).base_model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Load a checkpoint as :meth:`MultiverseForCausalLM.from_pretrained` does, and return its backbone."""
        loaded = MultiverseForCausalLM.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        return (loaded[0].base_model, loaded[1]) if isinstance(loaded, tuple) else loaded.base_model


@functools.cache
def multiverse_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the Multiverse class of a causal-LM class. Made once per base.

    It bears the base's own name: ``save_pretrained`` writes the class's name into ``architectures``, and a checkpoint
    must stay one of its base architecture for every loader that does not know Multiverse.
    """
    members = {"__module__": __name__, "_base_class": base, "forward": hooked_forward(base)}
    return type(base.__name__, (MultiverseForCausalLM, base), members)


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Return the Multiverse class of a causal LM by its name: an adapter's config names the class of its base so."""
    base = getattr(transformers, name, None) if name.endswith("ForCausalLM") else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return multiverse_class(base)


def _blank(base: type[PreTrainedModel]) -> PreTrainedModel:
    """Return an instance without state, for pickle to fill."""
    made = multiverse_class(base)
    return made.__new__(made)


integrate(MultiverseForCausalLM)
