"""A checkpoint behind ``transformers serve --trust-remote-code``: what the server asks for, in terms of this model.

The server takes a class of transformers by the name in ``architectures``. :func:`server_class` gives it this module's.
"""

import copy
import functools
import logging
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

logger = logging.getLogger(__name__)

SERVED = "MultiverseServedForCausalLM"  # no class of transformers is called this
SERVER = ("transformers.cli.serving.model_manager", "_load_model")  # where the server chooses a class


def server_class() -> str:
    """Return the name of a class of transformers that loads a checkpoint for the server; it is put there."""
    setattr(sys.modules[SERVER[0]].transformers, SERVED, ServedModel)  # there may be a second module transformers
    return SERVED


class ServedModel:
    """What the server finds in transformers and loads a checkpoint with."""

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> Any:
        """Return the Multiverse model of a checkpoint, whose ``generate`` understands the server."""
        model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
        if hasattr(type(model), "_base_class"):
            model.__class__ = _served(type(model))
        return model


@functools.cache
def _served(kind: type) -> type:
    return type(kind.__name__, (_Served, kind), {"__module__": kind.__module__})


class _Served:
    @property
    def init_continuous_batching(self) -> Any:
        """Be absent: the server then says so, and answers request by request, with branches."""
        raise AttributeError("init_continuous_batching")

    def generate(
        self, *args: Any, generation_config: GenerationConfig, streamer: Any | None = None, **kwargs: Any
    ) -> torch.LongTensor:
        """Answer as :meth:`MultiverseForCausalLM.generate` does, and let the server know whether it was cut off.

        The server asks for static caches with ``--compile``; decoding has pages of its own and does without. It calls
        an answer cut off that has ``max_new_tokens`` tokens; but this bounds the length, not the tokens of all paths
        together. So the server finds in its config, once the answer has ended, a bound that says what is true: 0, or
        none. A stop string of a client ends the answer, inside a path too.
        """
        own = copy.deepcopy(generation_config)
        structure = kwargs.get("structure", getattr(own, "structure", None))
        if own.cache_implementation == "static" and structure != "off":
            _warn("--compile does not apply: branches are decoded from pages, not from a static cache")
            own.cache_implementation = None
        options = kwargs | {"return_dict_in_generate": True}
        if getattr(own, "stop_scope", None) is None:
            options.setdefault("stop_scope", "answer")
        if streamer is not None:
            options["streamer"] = _Unended(streamer)
        output = super().generate(*args, generation_config=own, **options)
        if stats := getattr(output, "stats", None):  # structure="off" may have none
            is_whole = stats[0].finish_reason in ("stop", "stopping_criteria")
            generation_config.max_new_tokens = None if is_whole else 0
        if streamer is not None:
            streamer.end()
        return output.sequences


class _Unended:
    """A streamer that is not told of the end: the server looks at its config when it is."""

    def __init__(self, streamer: Any) -> None:
        self.put = streamer.put

    def end(self) -> None:
        pass


@functools.cache
def _warn(message: str) -> None:
    logger.warning(message)
