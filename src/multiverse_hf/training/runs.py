"""The folder of a run: one process writes there, nothing that is there is lost, and it is resumed as it was begun."""

import json
import zipfile
from pathlib import Path
from typing import Any

from multiverse_hf.outputs import lock_file

# What a resumed run may be told anew: none of it changes what is computed. And what starts with one of the prefixes.
MAY_CHANGE = {
    "check_rows", "output_dir", "resume_from_checkpoint", "report_to", "run_name", "project", "disable_tqdm",
    "do_eval", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "per_device_eval_batch_size", "load_best_model_at_end", "metric_for_best_model", "greater_is_better",
    "ddp_timeout", "local_rank", "hf_token", "cache_dir", "model_init_kwargs",
}  # fmt: skip
MAY_CHANGE_PREFIXES = ("logging", "log_", "save_", "eval_", "push_", "hub_")


def find_checkpoint(output: Path, resume: str | bool | None) -> str | None:
    """Check that a run harms nothing that is in its folder, and find the checkpoint to resume from.

    Args:
        output: the run's folder.
        resume: True for the newest whole checkpoint there, a checkpoint's folder, or None to begin.

    Returns:
        The checkpoint's folder; None if the run begins.

    Raises:
        ValueError: if the folder holds a run or a model that would be overwritten, or the checkpoint is not whole.
    """
    if (output / "run.json").exists():
        raise ValueError(f"{output} holds a finished run; choose another output_dir, or move it away")
    # the state is written last: a checkpoint without it was being written when the run was killed
    written = [state.parent for state in output.glob("checkpoint-*/trainer_state.json") if state.stat().st_size]
    if resume is True and written:
        resume = _newest_whole(written)
    elif resume is True:
        print(f"{output} holds no checkpoint to resume from; the run begins")
        resume = None
    elif resume:
        if not (Path(resume) / "trainer_state.json").is_file():
            raise ValueError(f"{resume} holds no checkpoint to resume from; leave out resume_from_checkpoint")
        if damaged := damaged_file(Path(resume)):
            raise ValueError(f"{damaged} is damaged; resume from another checkpoint")
    elif written:
        raise ValueError(
            f"{output} holds an unfinished run; go on with it (--resume_from_checkpoint true), choose another "
            "output_dir, or move it away"
        )
    if not (output / "begun.json").exists():
        models = [output / name for name in ("config.json", "adapter_config.json")]
        if found := [file.name for file in models if file.exists()]:
            raise ValueError(f"{output} holds a model ({found[0]}); choose another output_dir")
    return resume


def _newest_whole(checkpoints: list[Path]) -> str:
    for checkpoint in sorted(checkpoints, key=_step, reverse=True):
        damaged = damaged_file(checkpoint)
        if damaged is None:
            return str(checkpoint)
        print(f"{damaged} is damaged; the run goes on from the checkpoint before, if there is one")
    raise ValueError(f"no checkpoint in {checkpoints[0].parent} is whole; move the folder away, and begin anew")


def _step(checkpoint: Path) -> int:
    """Give the step of a checkpoint, by its folder's name ``checkpoint-<step>``."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def damaged_file(checkpoint: Path) -> Path | None:
    """Give a file of a checkpoint that is cut short, as a full disk or a broken copy leaves it; None if none is."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(checkpoint.rglob("*")):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):  # reads the header, which says how long the file is
                    pass
            elif file.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(file):  # whose end is its directory
                return file
            elif file.suffix == ".json":
                json.loads(file.read_bytes())
        except (SafetensorError, ValueError, OSError):
            return file
    return None


def claim(output: Path) -> Any:
    """Keep a run's folder for this process as long as the object that is given lives.

    Raises:
        ValueError: if another run is writing there.
    """
    lock = (output / ".running").open("w")
    if lock_file(lock) is False:
        raise ValueError(f"another run is writing to {output}; choose another output_dir")
    return lock


def check_same_run(run: Path, record: dict[str, Any]) -> None:
    """Check that a run is resumed with the rows and options it was begun with.

    The sampler would go on in another order, over other rows.

    Args:
        run: the folder that the checkpoint is in.
        record: what this run was told: data, training, model, processes.

    Raises:
        ValueError: if they are others, or the folder's record is damaged.
    """
    told = next((file for file in (run / "begun.json", run / "run.json") if file.is_file()), None)
    if told is None:
        return
    try:
        before = json.loads(told.read_bytes())
        parts, processes = {part: before[part] for part in ("data", "training", "model")}, before["processes"]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{told} is damaged; begin anew in another output_dir") from err
    now = json.loads(json.dumps(record, default=str))
    changed = [
        (name, value, now[part].get(name))
        for part, values in parts.items()
        for name, value in values.items()
        if name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_PREFIXES)
    ]
    for name, was, wanted in [*changed, ("number of processes", processes, now["processes"])]:
        if was != wanted:
            raise ValueError(
                f"{run} was begun with {name} {was}, now it is {wanted}; resume it with the same rows and options, or "
                "choose another output_dir"
            )
