"""``AutoConfig`` of a checkpoint that is loaded with ``trust_remote_code=True``: its base's own config class.

It is there for TRL, which takes the class of transformers that ``architectures`` names: the plain base class. For a
name that transformers does not have, TRL turns to ``AutoModelForCausalLM`` and so to the code of the checkpoint.
"""

import os
import sys
from typing import Any

from transformers import AutoConfig, PretrainedConfig

NOT_IN_TRANSFORMERS = "MultiverseForCausalLM"  # no class of transformers is called this
_LOADER = ("trl.trainer.utils", "create_model_from_path")


class MultiverseConfig:
    """What ``AutoConfig`` finds in ``auto_map``. No config is an instance of it."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Take the call that ``AutoConfig`` makes to a class which came with a checkpoint as its code."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Return the base architecture's config, as ``AutoConfig`` does without ``trust_remote_code``.

        TRL alone gets a config whose ``architectures`` begins with a name that transformers does not have. TRL reads
        the names from it and drops it. Others keep and save configs, or look the name up and fail.
        """
        loaded = AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config, PretrainedConfig) and _called_by_trl():
            config.architectures = [NOT_IN_TRANSFORMERS, *(config.architectures or [])]
        return loaded


def _called_by_trl() -> bool:
    """Return whether it is TRL's loader that called ``AutoConfig``, to choose a class by the config."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, AutoConfig.__module__):
        frame = frame.f_back
    return frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) == _LOADER
