"""Upload a built dataset folder to the Hub, in one commit.

    python datasets_scripts/publish.py Multiverse-1K OWNER/Multiverse-1K --dry-run
    python datasets_scripts/publish.py Multiverse-1K OWNER/Multiverse-1K --private

The folder's own card goes up as it is: pushing config by config would have ``datasets`` rewrite it, and lose which of
them is the default. Files of an earlier build that this one does not have are deleted in the same commit; others in
the repository stay. Credentials are those of the Hub's client: HF_TOKEN, or what ``hf auth login`` has stored.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from multiverse_hf.checkpoints import quiet
from multiverse_hf.data.folders import CARD_FILE, CONFIGS, DROPPED, PLOTS, STATISTICS
from multiverse_hf.errors import FAILURE, INTERRUPTED, CommandError, ScriptParser, one_line

BUILT = (CARD_FILE, STATISTICS, PLOTS, DROPPED, *(f"{config}/*.parquet" for config in CONFIGS))  # what a build writes
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def list_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the files to upload, and other files in the folder, which no build has written.

    Raises:
        CommandError: if the folder is no whole build, or its card does not fit it.
    """
    if not folder.is_dir():
        raise CommandError(f"no folder {folder}; build one first, e.g. with build_chains.py")
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    if CARD_FILE not in files:
        raise CommandError(f"{folder} holds no {CARD_FILE}; give a folder that a builder has written")
    card = read_card(folder)
    defaults = [config["config_name"] for config in card["configs"] if config.get("default")]
    if len(defaults) != 1:
        raise CommandError(f"the card of {folder} has {len(defaults)} default configs, not one; build it again")
    ours = [file for file in files if file in (CARD_FILE, STATISTICS, PLOTS, DROPPED)]
    for config, split, pattern, count in list_splits(card):
        found = [file for file in files if fnmatch(file, pattern)]
        if not found:
            raise CommandError(f"{folder} holds no {pattern}, which its card names; build it again")
        rows = sum(count_rows(folder / file) for file in found)
        if rows != count:
            raise CommandError(
                f"{folder} holds {rows} rows of {config}, {split}, and its card says {count}; build it again"
            )
        ours += found
    return sorted(ours), [file for file in files if file not in ours]


def list_splits(card: dict[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """Return config, split, the pattern of its files and the number of its rows, for all that a card names."""
    counts = {
        (info["config_name"], split["name"]): split["num_examples"]
        for info in card["dataset_info"]
        for split in info["splits"]
    }
    for config in card["configs"]:
        for each in config["data_files"]:
            yield config["config_name"], each["split"], each["path"], counts[config["config_name"], each["split"]]


def count_rows(file: Path) -> int:
    """Read every column of a file, and return the number of rows.

    Raises:
        CommandError: if it is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return sum(batch.num_rows for batch in pyarrow.parquet.ParquetFile(file).iter_batches())
    except (pyarrow.ArrowException, OSError) as err:
        raise CommandError(f"{file} is damaged ({one_line(err, 80)}); build it again") from err


def read_card(folder: Path) -> dict[str, Any]:
    """Return the configs of a card.

    Raises:
        CommandError: if it is no card that a builder has written.
    """
    from huggingface_hub import DatasetCard

    try:
        data = DatasetCard((folder / CARD_FILE).read_text(encoding="utf-8")).data.to_dict()
        list(list_splits(data))
    except (LookupError, TypeError, ValueError, OSError) as err:
        raise CommandError(f"cannot read the configs in {folder / CARD_FILE}: {one_line(err, 160)}") from err
    return data


def upload(folder: Path, files: list[str], repository: str, private: bool, message: str) -> str:
    """Upload a build, create a missing repository, and return the commit's address.

    Raises:
        CommandError: if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi()
    try:
        hub.create_repo(repository, repo_type="dataset", private=private or None, exist_ok=True)
        commit = hub.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=files,
            delete_patterns=list(BUILT),
            commit_message=message,
        )
    except HfHubHTTPError as err:
        status = err.response.status_code
        if status in (401, 403):
            raise CommandError(
                f"the Hub does not let you write to {repository} ({status}); set HF_TOKEN to a token that may, or log "
                "in with: hf auth login",
                FAILURE,
            ) from err
        raise CommandError(f"the Hub refuses {repository} ({status}): {one_line(err, 200)}", FAILURE) from err
    except Exception as err:  # the Hub's client raises errors of its own, and of its HTTP library
        raise CommandError(
            f"the upload to {repository} failed: {one_line(err, 200).rstrip('.')}. Nothing of it is visible there; "
            "start it anew",
            FAILURE,
        ) from err
    return commit.commit_url


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="as build_multiverse_1k.py or build_chains.py wrote it")
    parser.add_argument("repository", help="OWNER/NAME on the Hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default="Upload a new build", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="check the folder and say what would be uploaded")
    args = parser.parse_args()
    quiet()
    try:
        if not _REPOSITORY.fullmatch(args.repository):
            raise CommandError(f"a repository is OWNER/NAME, got {args.repository!r}")
        if not args.message.strip():
            raise CommandError("--message is empty; say what is new")
        files, others = list_files(args.folder)
        size = sum((args.folder / file).stat().st_size for file in files)
        for file in files if args.dry_run else []:
            print(f"{(args.folder / file).stat().st_size:>12,}  {file}")
        for file in others:
            print(f"left out, as no build writes it: {file}")
        if args.dry_run:
            print(f"{len(files)} files, {size:,} bytes would go to {args.repository} in one commit")
            return
        address = upload(args.folder, files, args.repository, args.private, args.message)
        print(f"{len(files)} files, {size:,} bytes: {address}")
    except CommandError as err:
        parser.exit(err.code, f"error: {err}\n")
    except KeyboardInterrupt:
        parser.exit(INTERRUPTED, "stopped\n")


if __name__ == "__main__":
    main()
