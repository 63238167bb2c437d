"""``multiverse curate``: check the input, run the tasks, and summarize.

Modules of the ``curate`` extra are imported inside functions, so that ``--help`` answers at once.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multiverse_hf.begun import explain_option
from multiverse_hf.checkpoints import quiet
from multiverse_hf.curator.options import ANSWERS_AGAIN, Curation, Settings
from multiverse_hf.errors import CommandError, one_line
from multiverse_hf.jobs.executors import check_executor, cores, slurm_executor, slurm_script, start_tasks
from multiverse_hf.jobs.folders import begin_or_resume, count_lines
from multiverse_hf.jobs.options import JobOutcome
from multiverse_hf.jobs.processes import stopping_at_sigterm
from multiverse_hf.outputs import check_output

if TYPE_CHECKING:
    from multiverse_hf.curator.results import CurationFolder
    from multiverse_hf.curator.task import CurationWork

NEEDED = {
    "datatrove": "curate",
    "openai": "curate",
    "tenacity": "curate",
    "rapidfuzz": "curate",
    "math_verify": "curate",
}
FAILED = ("rate limited", "server error", "timeout", "connection")  # calls that are repeated
_PRELOAD = ("multiverse_hf.curator.task",)
# Settings that do not change the rows; they may differ when a run is continued.
_MAY_DIFFER = (
    *("input", "rows", "versions", "base_url", "api_key_env", "prices"),
    *("concurrency", "timeout_s", "max_retries", "max_outage_s"),
)


def run_curation(curation: Curation) -> JobOutcome:
    """Curate the rows of a source that are not finished. With Slurm, submit the job.

    Raises:
        CommandError: if the input, an option or the folder is invalid, or a task failed. Finished rows and all paid
            replies are kept.
        KeyboardInterrupt: on Ctrl-C or a SIGTERM; likewise.
    """
    check_executor(curation.executor, "multiverse curate", NEEDED)
    quiet()
    from multiverse_hf.curator.results import CurationFolder, merge_outcomes
    from multiverse_hf.curator.task import CurateRows, CurationWork

    begin = time.perf_counter()
    folder = CurationFolder(curation.output.expanduser().absolute(), curation.tasks)
    source, rows, digest = _open_source(curation)
    work = CurationWork(folder, source, rows, curation.settings)
    if curation.cluster.dry_run:
        _settle(curation, work, digest)
        executor = slurm_executor(CurateRows(work), curation)
        return JobOutcome(folder.result, script=slurm_script(executor, len(folder.open_tasks())))
    if not folder.result.exists():
        curation.settings.api_key()  # fail now, not in each task
    check_output(folder.path, is_folder=True)
    busy = f"another run is at work in {curation.output}; wait for it, or name another folder"
    with folder.lock("run", busy), stopping_at_sigterm():
        _settle(curation, work, digest)
        before = rows if folder.result.exists() else folder.count_rows()
        if not folder.result.exists() and folder.open_tasks():
            workers = min(curation.workers or cores(), curation.tasks)
            progress = Progress(folder, curation.settings)
            advice = ", with fewer --workers or a lower concurrency"
            job = start_tasks(CurateRows(work), curation, workers, rows, _PRELOAD, advice, progress)
            if job is not None:
                return JobOutcome(folder.result, finished_before=before, job=job)
        if not folder.result.exists():
            merge_outcomes(folder, rows, curation.settings)
        return JobOutcome(folder.result, _read_summary(folder), before, time.perf_counter() - begin)


def _open_source(curation: Curation) -> tuple[str, int, str]:
    """Check that there are rows and that the first one is a trace.

    Returns:
        The source with an absolute path, its number of rows, and its digest.

    Raises:
        CommandError: if the check fails.
    """
    from multiverse_hf.curator.traces import count_rows, read_traces

    source, settings = curation.source, curation.settings
    path = Path(source).expanduser()
    if source.strip() and path.exists():
        source = str(path.absolute())
    try:
        first = next(read_traces(source, settings.columns, settings.subset, settings.split), None)
        if first is None:
            raise CommandError(
                f"{curation.source} holds no rows; write one JSON object with a prompt and reasoning a line"
            )
        if isinstance(first[1], Exception):
            unit = "line" if source.endswith(".jsonl") else "row"
            raise CommandError(f"{curation.source}, {unit} {first[0]}: {one_line(first[1])}")
        return source, *count_rows(source, settings.subset, settings.split)
    except ValueError as err:
        raise CommandError(one_line(err)) from err


def _settle(curation: Curation, work: "CurationWork", digest: str) -> None:
    """Store the settings of a new run, or check that they are those of the run in this folder."""
    from multiverse_hf.curator.stages import prompt_versions

    asked = {"input": work.source, "input_digest": digest, "rows": work.rows, "tasks": curation.tasks}
    asked |= dataclasses.asdict(work.settings) | {"prompts": prompt_versions()}

    def explain(name: str, stored: Mapping[str, Any], value: Any) -> str:
        if name == "input_digest":
            return f"with other rows than {curation.source} now has"
        if name == "tasks":
            return explain_option(name, stored, value)
        return f"with {name} {json.dumps(stored.get(name))}, now it is {json.dumps(value)}"

    packages = ("openai", "datatrove", "rapidfuzz", "math-verify")
    begin_or_resume(
        work.folder, curation.output, asked, _MAY_DIFFER, explain, packages, is_dry_run=curation.cluster.dry_run
    )


def _read_summary(folder: "CurationFolder") -> dict[str, Any]:
    """Return the summary of a finished run.

    Raises:
        CommandError: if its files have changed since.
    """
    way_out = f"delete {folder.result}, then the same command writes it again from the parts"
    try:
        summary = json.loads(folder.summary.read_bytes())
        accepted, rejected = summary["accepted"], sum(summary["rejected"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as err:
        raise CommandError(f"cannot read {folder.summary}: {one_line(err)}; {way_out}") from err
    for path, rows in ((folder.result, accepted), (folder.rejected, rejected)):
        if (found := count_lines(path)[0]) != rows:
            raise CommandError(f"{path} has {found} rows, and {rows} were written; {way_out}")
    return summary


class Progress:
    """Describes a run's progress, from the status files of its tasks."""

    def __init__(self, folder: "CurationFolder", settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self._trouble = ""  # the last reported one
        self._begin = time.time()

    def describe(self) -> str:
        """Return rejected rows, tokens, cost and repeated calls, and whether answers are missing."""
        total, troubles = self.read()
        if not total:
            return ""
        prompt, completion = total.get("prompt_tokens", 0), total.get("completion_tokens", 0)
        parts = ["waiting for answers"] if troubles or not total.get("calls answered") else []
        parts += [f"{total.get('rejected', 0)} rejected", f"{(prompt + completion) / 1e6:.2f} M tokens"]
        if (cost := self.settings.cost(self.settings.model, prompt, completion)) is not None:
            parts.append(f"${cost:.2f}")
        if again := sum(total.get(f"calls {kind}", 0) for kind in FAILED):
            parts.append(f"{again} calls again")
        return " · ".join(parts)

    def news(self) -> str:
        """Return a new message for the user: why no call is answered, or that calls are answered again."""
        _, troubles = self.read()
        before, self._trouble = self._trouble, "; ".join(sorted(troubles))
        if self._trouble == before:
            return ""
        return self._trouble or ANSWERS_AGAIN

    def read(self) -> tuple[dict[str, int], set[str]]:
        """Return the sums of the tasks' last counts, and their troubles with the endpoint."""
        total: Counter[str] = Counter()
        troubles: set[str] = set()
        for task in range(self.folder.tasks):
            path = self.folder.status(task)
            try:
                status, is_new = json.loads(path.read_bytes()), path.stat().st_mtime > self._begin
            except (OSError, ValueError):
                continue
            trouble = status.pop("trouble", None)
            if trouble and is_new:  # an earlier run may have left it
                troubles.add(trouble)
            total.update(status)
        return total, troubles
