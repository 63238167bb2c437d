"""Checkpoints as commands and recipes use them: opened and checked, loaded, and asked for an answer.

torch and transformers are imported inside functions, so that ``--help`` answers at once.
"""

import copy
import hashlib
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from multiverse_hf.data.records import read_answer
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.documents import DocumentError, parse_document
from multiverse_hf.errors import FAILURE, CommandError, install_line, one_line
from multiverse_hf.modeling.families import MULTIVERSE, Family, find_family
from multiverse_hf.modeling.gguf_files import SUFFIX, GgufError, gguf_options, reading, split_path
from multiverse_hf.modeling.tags import TagSet, encode_prompt

EMBEDDED = Path(__file__).parent / "assets" / "multiverse-tiny"
EMBEDDED_NAMES = ("multiverse-tiny", "multiverse-tiny-sequential")
MAX_NUM_SEQS = 64  # the engine's default; it is defined beside torch
# Files that hold one JSON object. transformers ignores a generation config that it cannot parse, and fails with an
# obscure error on other JSON.
_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
# Sampling is greedy well above this value; far below, divided scores leave float32's range.
MIN_TEMPERATURE = 1e-6
# One of these holds the vocabulary. Without any, transformers makes an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
SAMPLE = 1 << 20  # bytes at each end of a weights file that its fingerprint covers: training changes every tensor


class Dtype(StrEnum):
    """Number format of the weights."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Attention(StrEnum):
    """Attention implementations that can step several branches at once."""

    SDPA = "sdpa"
    EAGER = "eager"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose weights are not read yet."""

    name: str  # as the user gave it
    path: str
    config: Any
    tokenizer: Any
    tags: TagSet
    hidden: frozenset[int]  # ids outside an answer's text: end and padding tokens
    revision: str = "main"
    gguf_file: str | None = None  # name of the file in path that holds config, tokenizer and weights
    samples: bool = False  # its generation config samples

    @property
    def has_tags(self) -> bool:
        """Whether its vocabulary has the control tags, without which it cannot branch."""
        return bool(self.tokenizer.get_vocab().keys() & set(self.tags.names.tokens))

    @property
    def is_embedded(self) -> bool:
        """Whether it comes with this package, and so solves only sums of chains."""
        return Path(self.path).parent == EMBEDDED.parent

    @property
    def suffix(self) -> Suffix:
        """Sentence of record at the end of a prompt."""
        return Suffix.PARALLEL if self.tags.names.has_suffix else Suffix.NONE

    @property
    def record(self) -> dict[str, Any]:
        """Sampling of record of its family, as options of ``generate``. A checkpoint that is greedy stays so."""
        return self.tags.names.sampling if self.samples and self.has_tags else {}

    def with_record(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options of ``generate``, with the sampling of record where they do not say. None says nothing."""
        said = {name: value for name, value in options.items() if value is not None}
        return dict(options) if said.get("do_sample") is False else {**options, **self.record, **said}

    def encode(self, prompt: str | Sequence[dict[str, str]]) -> list[int]:
        """Return the ids of a prompt: text or chat messages.

        Raises:
            CommandError: if the checkpoint's chat template fails, or the prompt does not fit the context.
        """
        try:
            ids = encode_prompt(self.tokenizer, prompt, self.tags.names)
        except Exception as err:  # a chat template is the checkpoint's own program and may raise anything
            raise CommandError(
                f"the chat template of {self.name} cannot take the prompt: {one_line(err).rstrip('.')}; "
                "copy or download the checkpoint again"
            ) from err
        if not ids:
            raise CommandError(
                f"the tokenizer and chat template of {self.name} turn the prompt into no token; "
                "copy or download the checkpoint again"
            )
        context = getattr(self.config, "max_position_embeddings", None)
        if context is not None and len(ids) >= context:
            raise CommandError(f"the prompt has {len(ids)} tokens, the model's context {context}; shorten the prompt")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer with its tags, without end and padding tokens."""
        return self.tokenizer.decode([i for i in ids if i not in self.hidden], skip_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it cost."""

    document: str
    stats: Any  # GenerationStats
    seconds: float
    family: Family = MULTIVERSE

    @property
    def text(self) -> str:
        """The answer without parallel structure; the document itself if it does not parse."""
        try:
            return parse_document(self.document, self.family).sequential()
        except DocumentError:
            return self.document

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        names = ("num_tokens", "length", "parallelism", "num_steps", "num_forks", "max_width", "depth", "num_closed")
        stats = {name: getattr(self.stats, name) for name in names}
        stats |= {"finish_reason": str(self.stats.finish_reason), "malformed": self.stats.malformed}
        return {
            "document": self.document,
            "text": self.text,
            "answer": read_answer(self.document),
            "stats": stats,
            "seconds": round(self.seconds, 4),
        }


def quiet() -> None:
    """Turn off warnings and progress bars of libraries."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ.setdefault(
            "TQDM_DISABLE", "1"
        )  # read at its import: transformers unpacks GGUF files with a plain bar
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():  # in a terminal, users should see a download of gigabytes
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def open_checkpoint(name: str | None, revision: str = "main", needs_tags: bool = True) -> Checkpoint:
    """Read a checkpoint's config and tokenizer. Check that they fit each other and that the model can branch.

    Args:
        name: folder, repository, or a GGUF file in one; None for the embedded checkpoint.
        revision: revision of a repository.
        needs_tags: refuse a model without control tags. Otherwise such a model gets tags beyond its vocabulary, which
            it never writes. The engine runs it with ``structure="off"``.

    Raises:
        CommandError: if the checkpoint is missing, cannot be read, or cannot branch.
    """
    if name is None and not (EMBEDDED / "config.json").is_file():
        raise CommandError("this installation has no built-in model; choose one with --model FOLDER or REPO", FAILURE)
    shown = "multiverse-tiny" if name is None else name
    try:
        path = EMBEDDED if name is None else Path(name).expanduser()
        place, gguf_file = split_path(path)
        path = Path(place)
        if not path.exists() and name in EMBEDDED_NAMES:
            path = EMBEDDED.parent / name
        is_local = path.exists()
    except (OSError, RuntimeError) as err:  # a path that is too long, or the home of an unknown user
        raise CommandError(
            f"no model folder {one_line(shown, 80)} ({one_line(err, 80).rstrip('.')}); give an existing one"
        ) from err
    if not shown.strip():
        raise CommandError("the model's name is empty; give a folder, or a repository as owner/name")
    if is_local and gguf_file is None:
        _check_folder(path, shown)
    elif not is_local and (shown.startswith((".", "/", "~")) or str(path).count("/") != 1):
        raise CommandError(
            f"no model folder {shown}; give an existing folder, a repository as owner/name, or "
            f"{' or '.join(EMBEDDED_NAMES)}"
        )
    from transformers import AutoTokenizer, GenerationConfig

    from multiverse_hf.modeling.configuration_multiverse import MultiverseConfig
    from multiverse_hf.modeling.loading import base_class

    source = str(path) if is_local or gguf_file else shown
    gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        # never runs a checkpoint's own code, and never asks whether it may
        with reading(source, gguf_file):
            config = MultiverseConfig.from_pretrained(source, revision=revision, **gguf)
    except Exception as err:  # a checkpoint is input: any error of reading it is reported in one line
        raise _unreadable(shown, "config", err, is_local) from err
    try:
        base_class(config)
    except ValueError as err:
        raise CommandError(f"{shown} cannot branch: {one_line(err)}") from err
    try:
        with reading(source, gguf_file):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False, **gguf)
    except Exception as err:
        raise _unreadable(shown, "tokenizer", err, is_local) from err
    try:
        generation = GenerationConfig.from_pretrained(source, revision=revision) if gguf_file is None else None
    except OSError:  # the file is optional
        generation = None
    except Exception as err:
        raise _unreadable(shown, "generation config", err, is_local) from err
    generation = generation or GenerationConfig.from_model_config(config)
    try:
        stored, vocab = getattr(config, "multiverse", None), tokenizer.get_vocab()
        has_tags = needs_tags or stored is not None or bool(vocab.keys() & set(find_family(vocab).tokens))
        if not has_tags:
            beyond, hidden = TagSet.add_to(copy.deepcopy(tokenizer)), frozenset(tokenizer.all_special_ids)
            return Checkpoint(shown, source, config, tokenizer, beyond, hidden, revision, gguf_file)
        tags = None if stored is None else TagSet.from_dict(stored)
        spelled = TagSet.from_tokenizer(tokenizer, tags and tags.names)
    except ValueError as err:
        raise CommandError(f"{shown} is not a Multiverse model: {one_line(err)}") from err
    tags = tags or spelled
    _check_tags(shown, tags, spelled)
    if max(tags.control_ids) >= config.vocab_size:
        raise CommandError(
            f"{shown} has tags up to id {max(tags.control_ids)} but embeddings for {config.vocab_size} tokens only; "
            "resize the embeddings and train the model on tags"
        )
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    for end in ends:
        if end is not None and (not isinstance(end, int) or not 0 <= end < config.vocab_size):
            raise CommandError(
                f"{shown} names the end token {end!r}, which is none of its {config.vocab_size} token ids; "
                "mend eos_token_id in its generation_config.json"
            )
    # by id, not by skip_special_tokens: in some tokenizers the tags are special tokens too
    hidden = frozenset(tokenizer.all_special_ids) - frozenset(tags.control_ids)
    samples = bool(generation.do_sample)
    return Checkpoint(shown, source, config, tokenizer, tags, hidden, revision, gguf_file, samples)


def _check_folder(folder: Path, name: str) -> None:
    """Check a checkpoint's files for faults that transformers reports badly."""
    if (folder / "adapter_config.json").is_file():
        merge = f"multiverse merge --adapter {name} --output {name}-merged"
        raise CommandError(f"{name} is a LoRA adapter without its base; merge them with: {merge}")
    if not (folder / "config.json").is_file():
        file = min(folder.glob(f"*{SUFFIX}"), default=None)
        way = "give the folder of a checkpoint" if file is None else f"name its GGUF file: {file}"
        raise CommandError(f"{name} holds no config.json; {way}")
    # without its config, transformers takes the architecture's usual tokenizer, which may split text differently
    has_tokenizer = any(any(folder.glob(pattern)) for pattern in _VOCABULARIES)
    if not has_tokenizer or not (folder / "tokenizer_config.json").is_file():
        lacking = "tokenizer_config.json" if has_tokenizer else "tokenizer.json"
        raise CommandError(f"{name} holds no {lacking}; save the model's tokenizer there, or download it again")
    for file in (folder / each for each in _JSON_FILES):
        try:
            value = json.loads(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError) as err:
            raise _unreadable(name, file.name, err, is_local=True) from err
        if not isinstance(value, dict):
            raise _unreadable(
                name, file.name, ValueError(f"it holds {json.dumps(value):.40}, not an object"), is_local=True
            )


def _check_tags(name: str, stored: TagSet, spelled: TagSet) -> None:
    """Check that config and tokenizer have the same ids of tags."""
    for what in ("ids", "newline", "colon", "digits"):
        ours, theirs = getattr(stored, what), getattr(spelled, what)
        if ours == theirs:
            continue
        if isinstance(ours, dict):
            what = next(text for text in theirs if ours.get(text) != theirs[text])
            ours, theirs = ours.get(what), theirs[what]
        raise CommandError(
            f"config and tokenizer of {name} do not match: {what} is token {ours} in the config and {theirs} in the "
            "tokenizer; "
            "keep config.json and tokenizer of one model together"
        )


def _unreadable(name: str, part: str, error: Exception, is_local: bool) -> CommandError:
    """Return the error for a part of a checkpoint that cannot be read."""
    reason = one_line(error).rstrip(".")
    if gguf := gguf_reason(error):
        return CommandError(gguf)
    if isinstance(error, LookupError):  # its text is only the key
        reason = f"it has no {reason}"
    if not is_local and "connect" in reason:
        return CommandError(f"cannot reach the Hub for {name}, and it is not in the cache; check the network", FAILURE)
    if not is_local and "not a valid model identifier" in reason:
        return CommandError(f"no model {name}, neither as a folder nor on the Hub; check the name, or log in")
    if kind := re.search(r"model type `([^`]*)` but Transformers does not recognize", reason):
        return CommandError(f"this transformers does not know {name}'s architecture {kind[1]}; upgrade transformers")
    if isinstance(error, ImportError) or "attn_implementation" in reason:  # the way of loading is wrong, not the files
        return CommandError(f"cannot load {name} like this: {reason}")
    return CommandError(f"cannot read the {part} of {name}: {reason}; copy or download the checkpoint again")


def gguf_reason(error: Exception) -> str | None:
    """Return what is wrong with a GGUF file, or with the packages that read it, and the way out; None otherwise."""
    if isinstance(error, GgufError):
        return one_line(error)
    if isinstance(error, ModuleNotFoundError) and error.name in ("gguf", "accelerate"):
        return f"{error.name}, which reads GGUF files, is missing; {install_line('gguf')}"
    return None


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return a repository's commit, or a hash of a folder's files, of large files the ends."""
    commit = getattr(checkpoint.config, "_commit_hash", None)
    if not os.path.isdir(checkpoint.path):
        return str(commit)
    digest = hashlib.sha256()
    files = sorted(Path(checkpoint.path).iterdir())
    for path in files if checkpoint.gguf_file is None else [Path(checkpoint.path, checkpoint.gguf_file)]:
        if path.suffix in (SUFFIX, ".json", ".safetensors", ".bin", ".model", ".jinja", ".txt") and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(SAMPLE))
                file.seek(max(size - SAMPLE, 0))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def load_model(checkpoint: Checkpoint, dtype: Dtype, attention: Attention, device: str, threads: int | None) -> Any:
    """Return the model on a device, ready to answer prompts.

    Raises:
        CommandError: if weights are damaged or incomplete, or there is no such device.
    """
    from multiverse_hf.modeling.threads import set_threads

    if threads is not None:
        set_threads(threads)
    target = _find_device(device)
    return load_weights(checkpoint, dtype.value, attention.value).eval().to(target)


def load_weights(checkpoint: Checkpoint, dtype: str, attention: str | None) -> Any:
    """Return the model with exactly the weights of its config.

    Raises:
        CommandError: if weights are damaged, missing or unexpected.
    """
    from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM, base_class

    branches = checkpoint.has_tags
    try:
        with reading(checkpoint.path, checkpoint.gguf_file, NotImplementedError):
            model, info = (MultiverseForCausalLM if branches else base_class(checkpoint.config)).from_pretrained(
                checkpoint.path,
                revision=checkpoint.revision,
                config=checkpoint.config,
                **({"tags": checkpoint.tags} if branches else {}),
                **gguf_options(checkpoint.gguf_file),
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below by name
            )
    except Exception as err:  # as for the config: safetensors, pickle and json raise different errors
        raise _unreadable(checkpoint.name, "weights", err, os.path.isdir(checkpoint.path)) from err
    if wrong := sorted(key for key, *_ in info["mismatched_keys"]):
        raise CommandError(
            f"{checkpoint.name} has weights whose shapes differ from its config, such as {wrong[0]}; "
            "keep config.json and weights of one model together"
        )
    if missing := sorted(info["missing_keys"]):
        raise CommandError(
            f"{checkpoint.name} lacks {len(missing)} weights, such as {missing[0]}; download the checkpoint again"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        raise CommandError(
            f"{checkpoint.name} has weights that its config does not have, such as {unexpected[0]}; "
            "keep config.json and weights of one model together"
        )
    if not branches:  # the engine runs it with structure="off"
        model.config.multiverse = checkpoint.tags.to_dict()
        MultiverseForCausalLM.adopt(model)
    return model


def _find_device(name: str) -> Any:
    """Return the torch device that a user named."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # it must exist and compute, which the meta device does not
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise CommandError(f"no device {name!r} here; use --device cpu, cuda, cuda:0, ... or auto") from err
    return device


def answer_prompt(
    model: Any, checkpoint: Checkpoint, prompt: Sequence[int], streamer: Any = None, **options: Any
) -> Answer:
    """Answer one prompt of token ids, and measure the time.

    Raises:
        CommandError: if the model or its generation config cannot be used.
    """
    import torch

    ids = torch.tensor([list(prompt)], device=model.device)
    begin = time.perf_counter()
    try:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            return_dict_in_generate=True,
            **{name: value for name, value in options.items() if value is not None},
        )
    except ValueError as err:  # the commands check their own options, so the checkpoint is at fault
        raise CommandError(f"{checkpoint.name} cannot answer: {one_line(err).rstrip('.')}") from err
    seconds = time.perf_counter() - begin  # the ids are on the host, so the device is done
    document = checkpoint.decode(output.sequences[0, len(prompt) :].tolist())
    return Answer(document, output.stats[0], seconds, checkpoint.tags.names)
