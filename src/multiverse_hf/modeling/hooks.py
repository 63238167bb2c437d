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
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_chunked import CHUNKED
from .cpu import PackedLinear, using
from .labels import IGNORE, IMPOSSIBLE, forced_mask
from .layout import build_layout, has_block, is_plain
from .masks import SLIDING, document_masks, layer_kinds, pad_layouts, to_additive
from .tags import TagSet
from .traced import lay_out, refuse_blocks

# What models call the cache among their arguments: "cache" from transformers 5.24 on.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_PACKING = ("cu_seq_lens_q", "seq_idx")  # tell documents apart to kernels that this version of sdpa is not
_BACKBONE = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "use_cache")
_ROUNDING = 0.01  # of a vector's length: an adapter's share of it, rounded to bf16, depends on the shape of the batch
_MARK = "_multiverse_laid_out"  # attribute of a cache that was filled with laid-out rows
_HOOKED = "_multiverse_hooked"  # keyword that tells ``forward`` that the hooks run around it


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, the cache by the name that this version of transformers has for it."""
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    if CACHE != "past_key_values" and "past_key_values" in kwargs:
        kwargs.setdefault(CACHE, kwargs.pop("past_key_values"))
    return kwargs


@dataclass(frozen=True, slots=True)
class Rows:
    """What a call brings that the layout depends on.

    Attributes:
        ids: (B, L) int64 token ids. Rows that came as embeddings have the ids of tags and of forced text, else 0.
        attention_mask: (B, L), or None.
        position_ids: (B, L) or (1, L), or None.
    """

    ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None


def _brings_mask(kwargs: dict[str, Any]) -> bool:
    """Return whether a call brings a mask of its own: not one of padding, (B, L)."""
    mask = kwargs.get("attention_mask")
    return mask is not None and getattr(mask, "ndim", None) != 2


def read_rows(module: Any, kwargs: dict[str, Any], tags: TagSet) -> Rows | None:
    """Return the rows of a call if the layout has to be applied to them, None if they go through untouched.

    Args:
        module: the backbone or the causal LM.
        kwargs: of its forward.
        tags: the control tags.

    Raises:
        ValueError: if a row with a block comes with a mask, packing or cache that the layout cannot follow, or a cache
            with laid-out rows is continued.
    """
    mask, cache, positions = kwargs.get("attention_mask"), kwargs.get(CACHE), kwargs.get("position_ids")
    if getattr(cache, "is_log", False) or kwargs.get("segment_ids") is not None:  # the engine, or a layout as given
        return None
    if is_plain():  # last, as a tracer cannot read a context variable
        return None
    if getattr(cache, _MARK, False):
        raise ValueError(
            "this cache holds a document with parallel paths, which only the engine can go on from; call "
            "model.generate, or pass the whole text without past_key_values"
        )
    ids = kwargs.get("input_ids")
    if ids is None:
        embeds = kwargs.get("inputs_embeds")
        ids = None if embeds is None else recover_ids(module, embeds, tags)
    if ids is None or not bool((ids == tags.close("goal")).any()):
        return None
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError(
            f"{tags.names.close('goal')} comes after past_key_values, whose text the layout cannot see; pass the "
            "whole text as input_ids, or call model.generate. Prefix tuning brings such a cache: use LoRA or prompt "
            "tuning"
        )
    own_mask = _brings_mask(kwargs)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None or own_mask else mask != 0
    if not any(has_block(row[keep], tags) for row, keep in zip(ids, real, strict=True)):
        return None
    if own_mask:
        _check_own_layout(ids, positions, tags)
        return None
    _check_packing(kwargs)
    _check_cache(cache)
    return Rows(ids, mask, positions)


def _check_own_layout(ids: torch.Tensor, positions: torch.Tensor | None, tags: TagSet) -> None:
    """Check that a caller who brings a mask has laid the rows out: that the positions are those of the layout.

    Raises:
        ValueError: if they are not, since the mask is then one of causal text.
    """
    if positions is not None and positions.shape[-1] == ids.shape[1]:
        own = torch.stack([build_layout(row, tags).position_ids for row in ids])
        if torch.equal(positions.cpu().expand_as(own), own):
            return
    raise ValueError(
        "a row holds a parallel block, and the call brings a mask of its own without the layout's position_ids; pass "
        "attention_mask of shape (batch, length), with position_ids that restart at 0 for packed documents. To read "
        "tags as text, call the model inside multiverse_hf.modeling.layout.plain_layout()"
    )


def _check_packing(kwargs: dict[str, Any]) -> None:
    """Raise where documents are told apart by anything but positions: the base class would see one document."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None:
        return
    numbers = mask is not None and bool(((mask != 0) & (mask != 1)).any())
    found = [name for name in _PACKING if kwargs.get(name) is not None] + ["attention_mask"] * numbers
    if found:
        raise ValueError(
            f"a row holds a parallel block, and {found[0]} parts it into documents; pass position_ids that restart at "
            "0 where a document begins, and an attention_mask of 0 and 1 or none"
        )


def _check_cache(cache: Any) -> None:
    """Raise for a cache of fixed size, which no mask of whole documents fits."""
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            f"{type(cache).__name__} has a fixed size, and a row holds a parallel block; pass a DynamicCache, or none"
        )


def recover_ids(module: Any, embeds: torch.Tensor, tags: TagSet) -> torch.Tensor | None:
    """Return the ids that a layout needs from rows that came as embeddings, None if no ``</Goal>`` is among them.

    Args:
        module: has ``get_input_embeddings``.
        embeds: (B, L, H), made by that module; others, such as a tuned prompt, may stand beside them.
        tags: the control tags.

    Returns:
        (B, L) int64; 0 where the token is none that the layout or a forced text needs.

    Raises:
        ValueError: if a vector is almost that of ``</Goal>``, as noise makes it.
    """
    table = module.get_input_embeddings()
    goal_end = tags.close("goal")
    texts = [*tags.newline, *tags.colon, *(token for ids in tags.digits.values() for token in ids)]
    tokens = list(dict.fromkeys([goal_end, *tags.control_ids, *texts, *tags.label_pieces]))

    with torch.no_grad():
        vectors = table(torch.tensor(tokens, device=embeds.device))
        distances = _distances(embeds, vectors)
        distance, nearest = distances.min(-1)
        size = vectors.norm(dim=-1)
        found = distance <= size[nearest] * _ROUNDING
        near = embeds[~found & (distances[..., 0] < size[0] / 2)]
        for begin in range(0, module.config.vocab_size if len(near) else 0, 4096):  # other tokens may be near as well
            others = torch.arange(begin, min(begin + 4096, module.config.vocab_size), device=embeds.device)
            near = near[_distances(near[None], table(others))[0].amin(-1) > size[0] * _ROUNDING]
            if not len(near):
                break
        if len(near):
            raise ValueError(
                f"inputs_embeds hold a vector that is almost the one of {tags.names.close('goal')}: noise was added, "
                "or the table has changed; pass input_ids, and let the model embed them"
            )
        if not bool((found & (nearest == 0)).any()):
            return None
        other = next(token for token in range(len(tokens) + 1) if token not in tokens)
        ids = torch.where(found, torch.tensor(tokens, device=embeds.device)[nearest], other)
    return ids


def _distances(embeds: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return (B, L, N) the distances of embeddings (B, L, H) to vectors (N, H), in float32 at least."""
    dtype = torch.promote_types(embeds.dtype, torch.float32)
    vectors = vectors.to(dtype).expand(len(embeds), -1, -1)
    return torch.cdist(embeds.to(dtype), vectors, compute_mode="donot_use_mm_for_euclid_dist")


def is_traced(module: Any, kwargs: dict[str, Any]) -> bool:
    """Return whether a tracer reads this call and the operators of :mod:`~.traced` can serve it."""
    if not torch.compiler.is_compiling():
        return False
    has_own = kwargs.get("segment_ids") is not None or _brings_mask(kwargs)
    has_kernel = module.config._attn_implementation in ("sdpa", "eager", CHUNKED)
    return has_kernel and not has_own and kwargs.get("input_ids") is not None


def refuses_traced(kwargs: dict[str, Any]) -> bool:
    """Return whether a tracer reads ids beside a mask of the caller's own: they may hold no block then."""
    is_others = not getattr(kwargs.get(CACHE), "is_log", False) and kwargs.get("segment_ids") is None
    return torch.compiler.is_compiling() and is_others and _brings_mask(kwargs) and kwargs.get("input_ids") is not None


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
            ids = refuse_blocks(kwargs["input_ids"], torch.tensor(False), self.tags.close("goal"))
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
            mark = torch.as_tensor(getattr(cache, _MARK, False))
            return {**kwargs, "input_ids": refuse_blocks(ids, mark, self.tags.close("goal"))}
        _check_cache(cache)
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
            setattr(cache, _MARK, mark)


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
