"""GGUF files: where a path names one, and how to load one as plain weights that can be trained and saved.

transformers is imported inside functions: commands read paths before it is loaded.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SUFFIX = ".gguf"


class GgufError(OSError):
    """A GGUF file that is missing or cannot be read."""


def split_path(path: Any) -> tuple[Any, str | None]:
    """Return the folder or repository of a path that ends in ``.gguf``, and the name of the file in it.

    ``owner/name/FILE.gguf`` names a file of a repository where there is no folder ``owner/name``. Of any other path,
    return the path itself and None.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path).endswith(SUFFIX) or os.path.isdir(path):
        return path, None
    text = os.fspath(path)
    folder, name = os.path.split(text)
    parts = text.split("/")
    if len(parts) > 2 and not os.path.isdir(folder) and not text.startswith((".", "/", "~")):
        return "/".join(parts[:2]), "/".join(parts[2:])
    return folder or os.curdir, name


def gguf_options(file: str | None) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` for a model; none without a file.

    transformers can then save and train the model, as it marks only weights that stay packed as quantized.
    """
    if file is None:
        return {}
    from transformers import GgufConfig

    return {"gguf_file": file, "quantization_config": GgufConfig(dequantize=True)}


@contextmanager
def reading(path: Any, file: str | None, kinds: type[Exception] = Exception) -> Iterator[None]:
    """Check that a GGUF file can be read, and name it and the way out in errors of the context. Pass without a file.

    Args:
        path: folder or repository.
        file: name of the file in it.
        kinds: errors that mean a fault of the file.

    Raises:
        ModuleNotFoundError: if a package that transformers reads it with is missing.
        GgufError: if the file is missing, damaged, or of a kind that transformers cannot read.
    """
    if file is None:
        yield
        return
    from transformers.utils import is_accelerate_available, is_gguf_available

    place = os.path.join(path or "", file)
    for package, is_there in (("gguf", is_gguf_available()), ("accelerate", is_accelerate_available())):
        if not is_there:
            raise ModuleNotFoundError(f"{place} needs {package}; pip install gguf accelerate", name=package)
    try:
        yield
    except kinds as err:
        reason = " ".join(str(err).split()).rstrip(".") or type(err).__name__
        if "does not appear to have a file" in reason and os.path.isdir(path):
            others = ", ".join(sorted(name for name in os.listdir(path) if name.endswith(SUFFIX))) or "none"
            raise GgufError(f"no file {place}; GGUF files in its folder: {others:.200}") from err
        # transformers reads the header as a config; other errors of the kind are the Hub's, in its own words
        if isinstance(err, ImportError) or (isinstance(err, OSError) and "valid JSON" not in reason):
            raise
        if isinstance(err, NotImplementedError) or "GGMLQuantizationType" in reason:
            raise GgufError(
                f"{place} has a quantization that transformers cannot read ({reason}); choose another file of the "
                "model, such as its Q8_0"
            ) from err
        if "architecture" in reason:
            raise GgufError(
                f"transformers cannot read {place} ({reason}); use the model's safetensors checkpoint"
            ) from err
        raise GgufError(f"{place} is no GGUF file, or damaged ({reason}); download it again") from err
