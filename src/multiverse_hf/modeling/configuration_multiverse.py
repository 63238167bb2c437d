"""``AutoConfig`` of a checkpoint that is loaded with ``trust_remote_code=True``: its base's own config class.

It is there for TRL, which takes the class of transformers that ``architectures`` names: the plain base class. For a
name that transformers does not have, TRL turns to ``AutoModelForCausalLM`` and so to the code of the checkpoint.
And for ``transformers serve``, which does likewise and finds :mod:`.serve`.
"""

import os
import sys
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .serve import SERVER, server_class

NOT_IN_TRANSFORMERS = "MultiverseForCausalLM"  # no class of transformers is called this
_HUB = ("revision", "token", "cache_dir", "local_files_only", "subfolder")  # where to read a file from
_LOADER = ("trl.trainer.utils", "create_model_from_path")


class MultiverseConfig:
    """What ``AutoConfig`` finds in ``auto_map``. No config is an instance of it."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Take the call that ``AutoConfig`` makes to a class which came with a checkpoint as its code."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Return the base architecture's config, as ``AutoConfig`` does without ``trust_remote_code``.

        TRL alone gets a config whose ``architectures`` begins with a name that transformers does not have, and
        ``transformers serve`` one that begins with :class:`.serve.ServedModel`. They read the names from it and drop
        it. Others keep and save configs, or look the name up and fail.

        Raises:
            ValueError: if this release of transformers does not know the architecture.
        """
        path = pretrained_model_name_or_path
        try:
            loaded = AutoConfig.from_pretrained(path, trust_remote_code=False, **kwargs)
        except ValueError as err:
            if "custom code" not in str(err):
                raise
            # transformers asks to run this very code, which can only ask for the base's config again
            hub = {name: kwargs[name] for name in _HUB if name in kwargs}
            name = PretrainedConfig.get_config_dict(path, **hub)[0].get("model_type")
            raise ValueError(
                f"{path} has model type `{name}` but Transformers does not recognize it; upgrade transformers"
            ) from err
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config, PretrainedConfig):
            caller = _caller()
            if caller in (_LOADER, SERVER):
                name = NOT_IN_TRANSFORMERS if caller == _LOADER else server_class()
                config.architectures = [name, *(config.architectures or [])]
        return loaded


def _caller() -> tuple[str, str] | None:
    """Return the module and the function that called ``AutoConfig``."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in (__name__, AutoConfig.__module__):
        frame = frame.f_back
    return None if frame is None else (frame.f_globals.get("__name__", ""), frame.f_code.co_name)
