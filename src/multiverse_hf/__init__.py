"""Multiverse models on the Hugging Face stack: a model decides what to write in parallel (arXiv:2506.09991).

Importing the package is cheap: the public names below are imported when first used, and torch with them.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiverse_hf.documents import DocumentError, parse_document
    from multiverse_hf.modeling.engine_config import EngineConfig
    from multiverse_hf.modeling.labels import labels_for
    from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
    from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
    from multiverse_hf.modeling.tags import TagSet, encode_prompt

__version__ = "0.1.0.dev0"

__all__ = [
    "DocumentError",
    "EngineConfig",
    "MultiverseEngine",
    "MultiverseForCausalLM",
    "TagSet",
    "__version__",
    "embedded_model",
    "encode_prompt",
    "labels_for",
    "parse_document",
]

# public name -> module that defines it
_LAZY_EXPORTS = {
    "DocumentError": "multiverse_hf.documents",
    "EngineConfig": "multiverse_hf.modeling.engine_config",
    "MultiverseEngine": "multiverse_hf.modeling.multiverse_engine",
    "MultiverseForCausalLM": "multiverse_hf.modeling.modeling_multiverse",
    "TagSet": "multiverse_hf.modeling.tags",
    "encode_prompt": "multiverse_hf.modeling.tags",
    "labels_for": "multiverse_hf.modeling.labels",
    "parse_document": "multiverse_hf.documents",
}


def embedded_model(name: str = "multiverse-tiny") -> str:
    """Return the folder of a checkpoint that comes with the package.

    Args:
        name: ``multiverse-tiny``, or ``multiverse-tiny-sequential``, its autoregressive twin.

    Raises:
        ValueError: if the package has no such checkpoint.
    """
    assets = Path(__file__).parent / "assets"
    if not (assets / name / "config.json").is_file():
        there = sorted(path.parent.name for path in assets.glob("*/config.json"))
        raise ValueError(f"no embedded model {name!r}; the package has {', '.join(there) or 'none'}")
    return str(assets / name)


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_LAZY_EXPORTS[name]), name)
    globals()[name] = value  # the next access does not call this
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_EXPORTS})
