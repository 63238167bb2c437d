"""Hooks by which a model follows the layout: in its backbone, and on the causal LM around it.

The backbone's hook gives a row with parallel blocks its positions and its mask. It sits in the backbone, since
trainers call the backbone directly for their fused loss. The causal LM's hooks see to forced tokens: labels are
ignored there, and logits give them probability one.

A call that the hooks cannot serve raises. They never let a row with a complete block through as causal text.
"""

import contextlib
import functools
import inspect
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from .cpu import PackedLinear, using
from .forward_inputs import CACHE, MARK, check_cache, is_traced, named, read_rows, refuses_traced
from .labels import IGNORE, IMPOSSIBLE, forced_mask
from .layout import is_plain
from .masks import SLIDING, document_masks, layer_kinds, pad_layouts, to_additive
from .tags import TagSet
from .traced import lay_out, refuse_blocks

_BACKBONE = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "use_cache")
_HOOKED = "_multiverse_hooked"  # keyword that tells ``forward`` that the hooks run around it


def _dtype(module: Any) -> torch.dtype:
    """Return what a backbone computes in. A replica of DataParallel has its weights as attributes, not parameters."""
    return module.get_input_embeddings().weight.dtype


class LayoutHook:
    """What a backbone does before its forward: lay out the rows it is given.

    Rows without a complete block go through untouched: exactly the base model, with any attention kernel. Positions
    that restart at 0 part a row into packed documents. A caller may bring the layout as ``position_ids``,
    ``segment_ids`` and ``visible``; with a single segment that is plain causal text, whatever tags it holds.
    """

    def __init__(self, tags: TagSet) -> None:
        self.tags = tags
        self.text = json.dumps(tags.to_dict())  # what the operators for tracing take

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the forward, by name."""
        kwargs = named(_BACKBONE, args, kwargs)
        if is_traced(module, kwargs):
            return self._trace(module, kwargs)
        if refuses_traced(kwargs):
            ids = refuse_blocks(kwargs["input_ids"], torch.tensor(False), self.tags.trigger)
            return {**kwargs, "input_ids": ids}
        rows = read_rows(module, kwargs, self.tags)
        segment_ids, visible = kwargs.pop("segment_ids", None), kwargs.pop("visible", None)
        mask = kwargs.get("attention_mask")
        if rows is not None:
            layout = pad_layouts(rows.ids, rows.attention_mask, self.tags, rows.position_ids)
            kwargs["position_ids"], segment_ids, visible = layout
            self._mark_cache(module, kwargs)
        if segment_ids is None and visible is None:
            return kwargs
        if segment_ids is None or visible is None or kwargs.get("position_ids") is None:
            raise ValueError("a layout is position_ids, segment_ids and visible together; pass all three or none")
        if visible.shape[-1] == 1:  # plain text
            return kwargs
        dtype = _dtype(module)
        kwargs["attention_mask"] = document_masks(
            module.config, dtype, kwargs["position_ids"], segment_ids, visible, mask
        )
        return kwargs

    def _trace(self, module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments under ``torch.compile`` or ``torch.export``."""
        ids, mask, cache = kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get(CACHE)
        if cache is not None and cache.get_seq_length() > 0:
            mark = torch.as_tensor(getattr(cache, MARK, False))
            return {**kwargs, "input_ids": refuse_blocks(ids, mark, self.tags.trigger)}
        check_cache(cache)
        positions, seen, _, found = lay_out(ids, mask, kwargs.get("position_ids"), self.text)
        self._mark_cache(module, kwargs, found)
        masks = {}
        for kind in layer_kinds(module.config):
            near = positions[:, None, :, None] - positions[:, None, None, :] < (module.config.sliding_window or 0)
            masks[kind] = seen & near if kind == SLIDING else seen
            if module.config._attn_implementation == "eager":
                masks[kind] = to_additive(masks[kind], _dtype(module))
        attention_mask = masks if len(masks) > 1 else masks.popitem()[1]
        return {**kwargs, "position_ids": positions, "attention_mask": attention_mask}

    def _mark_cache(self, module: Any, kwargs: dict[str, Any], mark: bool | torch.Tensor = True) -> None:
        """Mark the cache that this call fills, so that no later call goes on from it as if it held causal text."""
        cache, use_cache = kwargs.get(CACHE), kwargs.get("use_cache")
        use_cache = module.config.use_cache if use_cache is None else use_cache
        if cache is None and use_cache and not (module.training and getattr(module, "gradient_checkpointing", False)):
            cache = kwargs[CACHE] = DynamicCache(config=module.config)  # as the backbone would make it
        if cache is not None:
            setattr(cache, MARK, mark)


class ForcedTokenHooks:
    """Hooks of a causal LM for the tokens that the engine writes: labels are ignored there, logits are certain.

    A call that brings its own mask or a filled cache is left alone: its labels and logits are its own affair.

    Args:
        model_class: of the causal LM.
        tags: the control tags.
    """

    def __init__(self, model_class: type[Any], tags: TagSet) -> None:
        self.names = tuple(inspect.signature(model_class.forward).parameters)[1:]  # of positional arguments
        self.tags = tags
        self.text = json.dumps(tags.to_dict())

    def _forced(self, module: Any, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the ids of the rows and where they hold forced tokens, (B, L) each; None if nothing is to be done."""
        if is_traced(module, kwargs):
            ids, cache = kwargs["input_ids"], kwargs.get(CACHE)
            if cache is not None and cache.get_seq_length() > 0:
                return None
            _, _, forced, _ = lay_out(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"), self.text)
            return ids, forced
        if refuses_traced(kwargs):
            return None
        segment_ids, visible = kwargs.get("segment_ids"), kwargs.get("visible")
        if segment_ids is not None and visible is not None and visible.shape[-1] > 1:  # the caller laid them out
            ids, positions = kwargs.get("input_ids"), kwargs.get("position_ids")
            if ids is None or positions is None or is_plain():
                return None
            return ids, forced_mask(ids, self.tags, kwargs.get("attention_mask"), positions, segment_ids)
        rows = read_rows(module, kwargs, self.tags)
        if rows is None:
            return None
        return rows.ids, forced_mask(rows.ids, self.tags, rows.attention_mask, rows.position_ids)

    def forward(self, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a forward that was called by name, without ``__call__`` and its hooks: AdaLoRA and X-LoRA do that."""
        args, kwargs = self._ignore_labels(args, kwargs, module)
        output = forward(*args, **kwargs)
        self.after(module, args, kwargs, output)
        return output

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Ignore the labels of forced tokens."""
        if not getattr(kwargs.get(CACHE), "is_log", False):
            args, kwargs = self._ignore_labels(args, kwargs, module)
        if "forward" not in vars(module):  # else somebody's own forward, which does not know the keyword
            kwargs[_HOOKED] = True
        return args, kwargs

    def _ignore_labels(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], module: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = named(self.names, args, kwargs)
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        if (labels is None and shifted is None) or (found := self._forced(module, kwargs)) is None:
            return (), kwargs
        _, forced = found
        if labels is not None:
            kwargs["labels"] = labels.masked_fill(forced.to(labels.device), IGNORE)
        if shifted is not None:  # of the next token
            after = torch.nn.functional.pad(forced[:, 1:], (0, 1))
            kwargs["shift_labels"] = shifted.masked_fill(after.to(shifted.device), IGNORE)
        return (), kwargs

    def after(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Give forced tokens probability one in the logits of the tokens before them, in place.

        Under a tracer the logits are copied instead.
        """
        if module.raw_forced_logits or getattr(kwargs.get(CACHE), "is_log", False):
            return
        values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
        logits = next((each for each in values if isinstance(each, torch.Tensor) and each.ndim == 3), None)
        if logits is None or (found := self._forced(module, kwargs)) is None:
            return
        ids, forced = found
        keep = kwargs.get("logits_to_keep", 0)
        columns = torch.arange(forced.shape[1], device=forced.device)
        columns = columns[-keep:] if isinstance(keep, int) else columns[keep]
        after = torch.nn.functional.pad(forced[:, 1:], (0, 1))[:, columns]
        if torch.compiler.is_compiling():
            tokens = ids.roll(-1, 1)[:, columns, None]
            certain = torch.full_like(logits, IMPOSSIBLE).scatter(-1, tokens, 0.0)
            output.logits = torch.where(after[..., None], certain, logits)
            return
        row, place = after.nonzero(as_tuple=True)
        logits[row, place] = IMPOSSIBLE
        logits[row, place, ids[row, columns[place] + 1]] = 0.0


@functools.cache
def backbone_class(base: type[Any]) -> type[Any]:
    """Return the class of a backbone that lays out what it is given, also where its ``forward`` is called by name.

    transformers keeps tables by a class's full name, so the class bears that of its base.
    """

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, **self._layout_hook(self, args, kwargs))
        with TURN:
            if not getattr(kwargs.get(CACHE), "is_log", False):
                args, kwargs = (), self._layout_hook(self, args, kwargs)
            return base.forward(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: int) -> Any:  # a class that was made cannot be imported by its name
        if type(self) is not backbone_class(base):
            return super(base, self).__reduce_ex__(protocol)
        return _blank_backbone, (base,), self.__dict__

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_backbone_class": base}
    return type(base.__name__, (base,), {**names, "forward": forward, "__reduce_ex__": __reduce_ex__})


def _blank_backbone(base: type[Any]) -> Any:
    """Return an instance without state, for pickle to fill."""
    made = backbone_class(base)
    return made.__new__(made)


def follow_layout(backbone: Any, tags: TagSet) -> None:
    """Have a backbone follow the layout, in place."""
    backbone.__class__ = backbone_class(getattr(type(backbone), "_backbone_class", type(backbone)))
    backbone._layout_hook = LayoutHook(tags)


def follow_layouts(model: Any, tags: TagSet) -> None:
    """Have a causal LM and its backbone follow the layout.

    Args:
        model: a causal LM of transformers.
        tags: the control tags.
    """
    follow_layout(model.base_model, tags)
    hooks = model._forced_token_hooks = ForcedTokenHooks(type(model), tags)
    model.register_forward_pre_hook(hooks.before, with_kwargs=True)
    model.register_forward_hook(hooks.after, with_kwargs=True)


def hooked_forward(base: type[Any]) -> Callable[..., Any]:
    """Return the ``forward`` of a class made of ``base``: the base's own, with :class:`ForcedTokenHooks` around it.

    The hooks run around ``__call__``; a caller of ``forward`` itself would go past them.
    """

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner = functools.partial(base.forward, self)
        if kwargs.pop(_HOOKED, False):
            return inner(*args, **kwargs)
        return self._forced_token_hooks.forward(self, inner, args, kwargs)

    return forward


# The engine's own passes

# The attention implementation is a setting of the model. An engine changes it for a pass, so it and other callers of
# the model take turns: a backbone's forward holds this lock.
TURN = threading.RLock()


def needs_eager(model: Any) -> bool:
    """Return whether a model attends as its own file has it, and not with torch's kernel."""
    with TURN:
        own = model.config._attn_implementation
    # flash and flex kernels take no mask of single tokens
    can_sdpa = model._supports_sdpa and getattr(model.config, "attn_logit_softcapping", None) is None
    return own == "eager" or (own != "sdpa" and not can_sdpa)


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode for a pass: trainers generate between steps, and dropout or activation
    checkpointing, which keeps no cache, would spoil the answer."""
    modules = [each for each in model.modules() if each.training]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True


@contextlib.contextmanager
def engine_pass(
    model: Any,
    configs: list[Any],
    attention: str,
    packed: Sequence[PackedLinear] = (),
    num_threads: int | None = None,
    is_static: bool = False,
) -> Iterator[None]:
    """Change a model for a pass of the engine's, while nobody else uses it. It is in evaluation mode then.

    A ``forward`` that a user compiled is left out: each step has other shapes, for which it would compile anew.

    Args:
        model: a causal LM.
        configs: of its modules.
        attention: name of the implementation to attend with.
        packed: linear layers with packed weights.
        num_threads: torch's number for the pass; None leaves it.
        is_static: decoding is static: it has fixed shapes, and compiles its own attention.
    """
    parts = model, model.base_model
    is_compiled = any("forward" in vars(each) or each._compiled_call_impl is not None for each in parts)
    stance = torch.compiler.set_stance("force_eager") if is_compiled and not is_static else contextlib.nullcontext()
    is_training = any(part.training for part in parts)
    mode = evaluating(model) if is_training else contextlib.nullcontext()
    with TURN, mode, stance, using(packed) if packed else contextlib.nullcontext():
        own, own_threads = configs[0]._attn_implementation, torch.get_num_threads()
        try:
            for config in configs:
                config._attn_implementation = attention
            if num_threads is not None:
                torch.set_num_threads(num_threads)
            yield
        finally:
            for config in configs:
                config._attn_implementation = own
            if num_threads is not None:
                torch.set_num_threads(own_threads)


def execution_device(model: Any) -> torch.device | None:
    """Return where accelerate's hooks run an offloaded model, whose own weights are on the meta device; else None."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (device := getattr(each, "execution_device", None)) is not None:
                return torch.device(device)
    return None
