"""The folder of a run: one process writes there, nothing in it is overwritten, and a resumed run keeps its options."""

import contextlib
import errno
import json
import os
import re
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from multiverse_hf.data.rows import RowEncoder
from multiverse_hf.errors import FAILURE, INTERRUPTED, CommandError, one_line
from multiverse_hf.outputs import lock_file
from multiverse_hf.provenance import versions
from multiverse_hf.training.arguments import OF_CHAINS
from multiverse_hf.training.splits import Splits

# Options that may differ in a resumed run, as they do not change the computation; likewise those with a prefix below.
MAY_CHANGE = {
    "check_rows", "strict", "output_dir", "resume_from_checkpoint", "report_to", "run_name", "project", "disable_tqdm",
    "do_eval", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "ddp_timeout", "local_rank", "hf_token", "cache_dir", "model_init_kwargs",
}  # fmt: skip
MAY_CHANGE_PREFIXES = ("logging", "log_", "save_", "eval_", "push_", "hub_")


def find_checkpoint(output: Path, resume: str | bool | None) -> str | None:
    """Return the checkpoint to resume from, and check that the run overwrites nothing in its folder.

    Args:
        output: the run's folder.
        resume: True for the newest whole checkpoint, a checkpoint's folder, or None to begin.

    Returns:
        The checkpoint's folder; None if the run begins.

    Raises:
        CommandError: if the folder holds a run or a model, or the checkpoint is damaged.
    """
    if (output / "run.json").exists():
        raise CommandError(f"{output} holds a finished run; choose another output_dir, or move it away")
    # the state is written last: without it, the run was killed while it wrote the checkpoint
    written = [state.parent for state in output.glob("checkpoint-*/trainer_state.json") if state.stat().st_size]
    if resume is True and written:
        resume = _newest_whole(written)
    elif resume is True:
        print(f"{output} holds no checkpoint to resume from; the run begins")
        resume = None
    elif resume:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise CommandError(f"{resume} holds no checkpoint to resume from; leave out resume_from_checkpoint")
        if damaged := damaged_file(Path(resume)):
            raise CommandError(f"{damaged} is damaged; resume from another checkpoint")
    elif written:
        raise CommandError(
            f"{output} holds an unfinished run; go on with it (--resume_from_checkpoint true), choose another "
            "output_dir, or move it away"
        )
    if not (output / "begun.json").exists():
        models = [output / name for name in ("config.json", "adapter_config.json")]
        if found := [file.name for file in models if file.exists()]:
            raise CommandError(f"{output} holds a model ({found[0]}); choose another output_dir")
    return resume


def _newest_whole(checkpoints: list[Path]) -> str:
    for checkpoint in sorted(checkpoints, key=_step, reverse=True):
        damaged = damaged_file(checkpoint)
        if damaged is None:
            return str(checkpoint)
        print(f"{damaged} is damaged; the run continues from the checkpoint before it, if there is one")
    raise CommandError(f"no checkpoint in {checkpoints[0].parent} is whole; move the folder away, and begin anew")


def _step(checkpoint: Path) -> int:
    """Return the step of a checkpoint from its folder's name ``checkpoint-<step>``, -1 for other names."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def damaged_file(checkpoint: Path) -> Path | None:
    """Return a truncated file of a checkpoint, as after a full disk or a broken copy; None if there is none."""
    for file in sorted(checkpoint.rglob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # reads the header, which has the file's length
                    pass
            elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(
                file
            ):  # its directory is at its end
                return file
            elif file.suffix == ".json":
                json.loads(file.read_bytes())
        except (SafetensorError, ValueError, OSError):
            return file
    return None


@contextlib.contextmanager
def claim(output: Path, is_needed: bool = True) -> Iterator[None]:
    """Lock a run's folder for this process.

    Raises:
        CommandError: if another run is writing there.
    """
    if not is_needed:
        yield
        return
    file = output / ".running"
    with file.open("w") as lock:
        if lock_file(lock) is False:
            raise CommandError(f"another run is writing to {output}; choose another output_dir")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[None]:
    """End the process with one line for a user's interrupt, an invalid input or a full disk."""
    try:
        yield
    except CommandError as err:
        _end(f"error: {err}", err.code)
    except KeyboardInterrupt:
        _end("stopped; continue from the last checkpoint with --resume_from_checkpoint true", INTERRUPTED)
    except (OSError, RuntimeError, SafetensorError) as err:
        is_full = isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # texts of torch and safetensors
        if not is_full and not re.search(r"No space left|File too large|PytorchStreamWriter failed", str(err)):
            raise
        way = "free disk space, then use --resume_from_checkpoint true"
        _end(f"error: cannot write: {one_line(err, 120)}; {way}", FAILURE)


def _end(message: str, code: int) -> NoReturn:
    """Print a message and end the process.

    torchrun prints its own traceback after it. The file it names holds what this traceback ends with.
    """
    print(message, file=sys.stderr)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": message, "timestamp": int(time.time())}))
    sys.exit(code)


def describe_run(
    data: Any, training: Any, model_args: Any, splits: Splits, dataset: Any, encoder: RowEncoder, model: Any
) -> dict[str, Any]:
    """Return the record of a run: settings, counts and fingerprint of rows, and versions.

    Args:
        data, training, model_args: the options, resolved.
        splits: the rows.
        dataset: the encoded rows to train on.
        encoder: has the ``max_length`` of rows.
        model: the base model.
    """
    config, is_chains = model.config, data.dataset_name == "chains"
    return {
        "data": {name: value for name, value in asdict(data).items() if is_chains or name not in OF_CHAINS}
        | {
            "fingerprint": dataset._fingerprint,
            "num_tokens": sum(map(len, dataset["input_ids"])),
            "rows": splits.train.report.summary(),
            "trained_on": len(splits.train.records),
            "test_rows": splits.test.report.summary() if data.dataset_test_split else None,
        },
        "training": training.to_dict() | {"max_length": encoder.max_length},
        "model": asdict(model_args)
        | {
            "attn_implementation": config._attn_implementation,
            "base_is_folder": Path(model_args.model_name_or_path).expanduser().exists(),
            "model_type": config.get_text_config().model_type,
        },
        "processes": training.world_size,
        "versions": versions("trl", "accelerate", "datasets", "peft"),
    }


def check_same_run(checkpoint: str | None, record: dict[str, Any]) -> None:
    """Check that a run is resumed with the rows and options that it began with.

    With others, the sampler would continue in another order, over other rows.

    Args:
        checkpoint: the folder to resume from, None if the run begins.
        record: data, training, model and processes of this run.

    Raises:
        CommandError: if they differ, or the folder's record is damaged.
    """
    if checkpoint is None:
        return
    run = Path(checkpoint).resolve().parent
    told = next((file for file in (run / "begun.json", run / "run.json") if file.is_file()), None)
    if told is None:
        return
    try:
        before = json.loads(told.read_bytes())
        parts, processes = {part: before[part] for part in ("data", "training", "model")}, before["processes"]
    except (ValueError, KeyError, TypeError) as err:
        raise CommandError(f"{told} is damaged; begin anew in another output_dir", FAILURE) from err
    now = json.loads(json.dumps(record, default=str))
    changed = [
        (name, value, now[part].get(name))
        for part, values in parts.items()
        for name, value in values.items()
        if name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_PREFIXES)
    ]
    for name, was, wanted in [*changed, ("number of processes", processes, now["processes"])]:
        if was != wanted:
            raise CommandError(
                f"{run} was begun with {name} {was}, now it is {wanted}; resume it with the same rows and options, or "
                "choose another output_dir",
                FAILURE,
            )
