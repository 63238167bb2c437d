"""Files of the curator: outcomes in parts, and the accepted rows, rejected rows and summary made from them."""

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from multiverse_hf import __version__
from multiverse_hf.curator.assembly import character_parallelism
from multiverse_hf.curator.curation import Outcome
from multiverse_hf.curator.options import Settings
from multiverse_hf.curator.stages import prompt_versions
from multiverse_hf.curator.tally import Tally
from multiverse_hf.errors import FAILURE, CommandError
from multiverse_hf.jobs.folders import JobFolder, whole_lines, writing
from multiverse_hf.outputs import write_output

_NUMBER = re.compile(rb'\{"number": (\d+),')


class CurationFolder(JobFolder):
    """Paths in the folder of a curation."""

    __slots__ = ()
    result_name = "curated.jsonl"

    @property
    def rejected(self) -> Path:
        """Rejected rows, each with all attempts."""
        return self.path / "rejected" / "rejected.jsonl"

    @property
    def summary(self) -> Path:
        """The run's summary."""
        return self.path / "summary.json"

    def calls(self, task: int) -> Path:
        """A task's log of calls."""
        return self.path / "calls" / f"{task:05d}.sqlite3"

    def status(self, task: int) -> Path:
        """A task's status."""
        return self.path / "status" / f"{task:05d}.json"


def describe_outcome(outcome: Outcome, settings: Settings) -> dict[str, Any]:
    """Return the line of a trace in its task's part: an accepted row, or the reason of its rejection."""
    draft, trace, attempts = outcome.draft, outcome.draft.trace, [asdict(each) for each in outcome.attempts]
    row: dict[str, Any] = {"id": trace.id, "prompt": trace.prompt}
    if outcome.refusal is None:
        for each in attempts:
            del each["reply"]
        row |= {"document": draft.text, "answer": trace.answer, "sequential": trace.reasoning}
        usage = {name: sum(each[name] for each in attempts) for name in ("prompt_tokens", "completion_tokens")}
        row["provenance"] = {
            "curator": __version__,
            "model": settings.model,
            "judge": settings.judge_name,
            "prompts": prompt_versions(),
            "seed": settings.seed,
            "attempts": attempts,
            "usage": usage | {"calls": len(attempts)},
            "distance": draft.distance,
            "path_distances": draft.path_distances,
            "parallelism": character_parallelism(draft.document),
        }
    else:
        row |= {"answer": trace.answer, "reasoning": trace.reasoning}
        row |= {"stage": outcome.stage, "check": outcome.refusal.check, "detail": outcome.refusal.detail}
        row["attempts"] = attempts
    return {"number": trace.number, "accepted": outcome.refusal is None, "row": row}


def describe_bad_row(number: int, detail: str) -> dict[str, Any]:
    """Return the line of a row that is no trace."""
    row = {"id": str(number), "prompt": None, "answer": None, "reasoning": None}
    row |= {"stage": "input", "check": "input", "detail": detail, "attempts": []}
    return {"number": number, "accepted": False, "row": row}


def number_of(line: bytes, part: Path) -> int:
    """Return the number of a line's row without parsing the row.

    Raises:
        CommandError: if the line is damaged.
    """
    match = _NUMBER.match(line)
    if match is None:
        raise CommandError(f"{part} holds a damaged line ({line[:40]!r}); delete the line and run again", FAILURE)
    return int(match[1])


def read_outcomes(folder: CurationFolder) -> Iterator[dict[str, Any]]:
    """Yield the lines of all parts that are written so far."""
    for task in range(folder.tasks):
        for path in (folder.part(task), folder.unfinished(task)):
            if path.exists():
                yield from (json.loads(line) for _, line in whole_lines(path))


def merge_outcomes(folder: CurationFolder, rows: int, settings: Settings) -> None:
    """Write accepted and rejected rows to one file each, in the input's order: whole or not at all.

    Args:
        folder: folder in which all parts are complete.
        rows: number of rows of the input.
        settings: settings with the prices.

    Raises:
        CommandError: if a part is damaged or rows are missing.
    """
    with folder.lock("merge"):
        if folder.result.exists():
            return
        parts = [folder.part(task) for task in range(folder.tasks)]
        places = [_index(part, folder.tasks) for part in parts]
        found = sum(1 for index in places for place in index if place >= 0)
        if found != rows:
            raise CommandError(
                f"{folder.path / 'parts'} holds {found} of {rows} rows; delete it and run again", FAILURE
            )
        folder.rejected.parent.mkdir(exist_ok=True)
        tally = Tally()
        # the file of accepted rows gets its name last, and so marks the run as complete
        with writing(folder.result) as accepted, writing(folder.rejected) as rejected:
            for line in _in_order(parts, places):
                outcome = json.loads(line)
                tally.add(outcome)
                file = accepted if outcome["accepted"] else rejected
                file.write(json.dumps(outcome["row"], ensure_ascii=False).encode() + b"\n")
            write_output(folder.summary, json.dumps(tally.to_dict(settings), indent=2) + "\n")


def _index(part: Path, tasks: int) -> array:
    """Return the offset of each row of a part by its number in the part; -1 for a missing row."""
    places = array("q")
    for begin, line in whole_lines(part):
        place = (number_of(line, part) - 1) // tasks
        places.extend([-1] * (place + 1 - len(places)))
        if places[place] >= 0:
            raise CommandError(f"{part} has row {number_of(line, part)} twice; delete one", FAILURE)
        places[place] = begin
    return places


def _in_order(parts: list[Path], places: list[array]) -> Iterator[bytes]:
    for number in range(max(map(len, places), default=0) * len(parts)):
        place, task = divmod(number, len(parts))
        if place < len(places[task]) and places[task][place] >= 0:
            with parts[task].open("rb") as file:  # opened each time: there may be more parts than open files allowed
                file.seek(places[task][place])
                yield file.readline()
