"""Checkpoints as the commands use them: opened with every fault told in a line, loaded, and asked for an answer.

torch and transformers are imported inside functions, so that ``--help`` answers at once.
"""

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from multiverse_hf.documents import DocumentError, parse_document
from multiverse_hf.modeling.tags import TagSet, encode_prompt

EMBEDDED = Path(__file__).parent / "assets" / "multiverse-tiny"
USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit codes: bad input, failure while running, Ctrl-C


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


class CommandError(Exception):
    """What went wrong, for one line on standard error, and the exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose weights are not read yet."""

    name: str  # as the user gave it
    path: str
    config: Any
    tokenizer: Any
    tags: TagSet
    hidden: frozenset[int]  # ids that are not part of an answer's text: end and padding tokens

    def encode(self, prompt: str) -> list[int]:
        """Tokenize a prompt.

        Raises:
            CommandError: if it does not fit the context.
        """
        ids = encode_prompt(self.tokenizer, prompt, self.tags.names)
        context = getattr(self.config, "max_position_embeddings", None)
        if context is not None and len(ids) >= context:
            raise CommandError(f"the prompt has {len(ids)} tokens, the model's context {context}; shorten the prompt")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of an answer, its tags included, without end and padding tokens."""
        return self.tokenizer.decode([i for i in ids if i not in self.hidden], skip_special_tokens=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it cost."""

    document: str
    stats: Any  # GenerationStats
    seconds: float

    @property
    def text(self) -> str:
        """The answer without parallel structure; the document itself where it does not parse."""
        try:
            return parse_document(self.document).sequential()
        except DocumentError:
            return self.document

    def to_dict(self) -> dict[str, Any]:
        """Give the JSON form."""
        names = ("num_tokens", "length", "parallelism", "num_steps", "num_forks", "max_width", "depth")
        stats = {name: getattr(self.stats, name) for name in names}
        stats |= {"finish_reason": str(self.stats.finish_reason), "malformed": self.stats.malformed}
        last = re.search(r"^Answer:[ \t]*(\S[^\n]*?)\s*\Z", self.document, re.MULTILINE)
        return {
            "document": self.document,
            "text": self.text,
            "answer": last[1] if last else None,
            "stats": stats,
            "seconds": round(self.seconds, 4),
        }


def quiet() -> None:
    """Keep warnings and progress bars of libraries off the screen."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():  # in a terminal a download of gigabytes should be seen
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


def one_line(error: BaseException | str, most: int = 400) -> str:
    """Put a message on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def open_checkpoint(name: str | None) -> Checkpoint:
    """Read a checkpoint's config and tokenizer, and check that the model can branch.

    Raises:
        CommandError: if there is none, it cannot be read, or it is of a kind that cannot branch.
    """
    if name is None and not (EMBEDDED / "config.json").is_file():
        raise CommandError("this installation has no built-in model; choose one with --model FOLDER or REPO", FAILURE)
    path = Path(name).expanduser() if name is not None else EMBEDDED
    shown = name or "multiverse-tiny"
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise CommandError(f"no model folder {name}; give an existing folder, or a repository as owner/name")
    if path.exists() and not (path / "config.json").is_file():
        raise CommandError(f"{name} holds no config.json; --model takes the folder of a checkpoint")
    from transformers import AutoConfig, AutoTokenizer

    from multiverse_hf.modeling.modeling_multiverse import base_class

    source = str(path) if path.exists() else name
    try:
        # False, not the default: a checkpoint's own code is never run here, and nobody is asked whether it may be
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as err:  # a checkpoint is input: whatever reading it raises is to be said in a line
        raise _unreadable(shown, "config", err, is_local=path.exists()) from err
    try:
        base_class(config)
    except ValueError as err:
        raise CommandError(f"{shown} cannot branch: {one_line(err)}") from err
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as err:
        raise _unreadable(shown, "tokenizer", err, is_local=path.exists()) from err
    try:
        stored = getattr(config, "multiverse", None)
        tags = TagSet.from_tokenizer(tokenizer) if stored is None else TagSet.from_dict(stored)
    except ValueError as err:
        raise CommandError(f"{shown} is not a Multiverse model: {one_line(err)}") from err
    if max(tags.control_ids) >= config.vocab_size:
        raise CommandError(
            f"{shown} has tags up to id {max(tags.control_ids)} but embeddings for {config.vocab_size} tokens only; "
            "resize the embeddings and train the model on tags"
        )
    # by id, not by skip_special_tokens: some tokenizers hold the tags to be special as well
    hidden = frozenset(tokenizer.all_special_ids) - frozenset(tags.control_ids)
    return Checkpoint(shown, source, config, tokenizer, tags, hidden)


def _unreadable(name: str, part: str, error: Exception, is_local: bool) -> CommandError:
    """Say why a part of a checkpoint could not be read."""
    reason = one_line(error).rstrip(".")
    if isinstance(error, LookupError):  # whose text is the key alone
        reason = f"it has no {reason}"
    if not is_local and "connect" in reason:
        return CommandError(f"cannot reach the Hub for {name}, and it is not in the cache; check the network", FAILURE)
    if not is_local and "not a valid model identifier" in reason:
        return CommandError(f"no model {name}, neither as a folder nor on the Hub; check the name, or log in")
    if kind := re.search(r"model type `([^`]*)` but Transformers does not recognize", reason):
        return CommandError(f"this transformers does not know {name}'s architecture {kind[1]}; upgrade transformers")
    return CommandError(f"cannot read the {part} of {name}: {reason}; copy or download the checkpoint again")


def load_model(checkpoint: Checkpoint, dtype: Dtype, attention: Attention, device: str, threads: int | None) -> Any:
    """Read the weights onto a device.

    Raises:
        CommandError: if they are damaged or incomplete, or there is no such device.
    """
    import torch

    from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM

    if threads is not None:
        torch.set_num_threads(threads)
    target = _find_device(device)
    try:
        model, info = MultiverseForCausalLM.from_pretrained(
            checkpoint.path,
            config=checkpoint.config,
            tags=checkpoint.tags,
            dtype=dtype.value,
            attn_implementation=attention.value,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told of below, by name
        )
    except Exception as err:  # as for the config: safetensors, pickle and json all raise errors of their own
        raise _unreadable(checkpoint.name, "weights", err, os.path.isdir(checkpoint.path)) from err
    if wrong := sorted(key for key, *_ in info["mismatched_keys"]):
        raise CommandError(
            f"{checkpoint.name} has weights of other shapes than its config says, {wrong[0]} among them; "
            "keep config.json and weights of one model together"
        )
    if missing := sorted(info["missing_keys"]):
        raise CommandError(
            f"{checkpoint.name} lacks {len(missing)} weights, {missing[0]} among them; download the checkpoint again"
        )
    return model.eval().to(target)


def _find_device(name: str) -> Any:
    """Give the torch device a user means."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # whether it is there
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise CommandError(f"no device {name!r} here; use --device cpu, cuda, cuda:0, ... or auto") from err
    return device


def answer_prompt(
    model: Any, checkpoint: Checkpoint, prompt: Sequence[int], streamer: Any = None, **options: Any
) -> Answer:
    """Answer one prompt, given as token ids, and take the time."""
    import torch

    ids = torch.tensor([list(prompt)], device=model.device)
    begin = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=streamer,
        return_dict_in_generate=True,
        **{name: value for name, value in options.items() if value is not None},
    )
    seconds = time.perf_counter() - begin  # the ids came back to the host, so the device is done
    return Answer(checkpoint.decode(output.sequences[0, len(prompt) :].tolist()), output.stats[0], seconds)
