"""Multiverse models on the Hugging Face stack: parallel generation that a model decides itself (arXiv:2506.09991).

Importing the package is cheap: the public names below are imported when first used, and torch with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiverse_hf.documents import DocumentError, parse_document
    from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
    from multiverse_hf.modeling.tags import TagSet

__version__ = "0.1.0.dev0"

__all__ = ["DocumentError", "MultiverseForCausalLM", "TagSet", "__version__", "parse_document"]

# public name -> module that defines it
_LAZY_EXPORTS = {
    "DocumentError": "multiverse_hf.documents",
    "MultiverseForCausalLM": "multiverse_hf.modeling.modeling_multiverse",
    "TagSet": "multiverse_hf.modeling.tags",
    "parse_document": "multiverse_hf.documents",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_LAZY_EXPORTS[name]), name)
    globals()[name] = value  # so that the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY_EXPORTS})
