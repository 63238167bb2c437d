"""``multiverse families``: the families of checkpoints that the library knows."""

import dataclasses
import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from multiverse_hf.cli.options import JsonOption, TracebackOption, print_json
from multiverse_hf.modeling.families import FAMILIES, Family, pieces_of


def list_families(as_json: JsonOption = False, traceback: TracebackOption = False) -> None:
    """List the families of checkpoints: their tags, what opens the paths, and the prompt and sampling of record.

    \b
    Examples:
      multiverse families
      multiverse families --json
    """
    if as_json:
        print_json({name: dataclasses.asdict(family) | rules_for_people(family) for name, family in FAMILIES.items()})
        return
    rows = [[name, *rules_for_people(family).values()] for name, family in FAMILIES.items()]
    columns = ["family", *(heading.replace("_", " ") for heading in rules_for_people(next(iter(FAMILIES.values()))))]
    table = Table(*(Column(name, overflow="fold") for name in columns), box=SIMPLE_HEAD)
    for cells in rows:
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


def rules_for_people(family: Family) -> dict[str, str]:
    """Return a family's rules for people, by the headings of the table."""
    limits = [f"{value} {name.removeprefix('max_')}" for name, value in family.limits.items() if value is not None]
    return {
        "tags": " ".join(name for _, name in family.items()),
        "paths_open_at": family.trigger,
        "number_of_paths": "one for each outline" if family.num_paths is None else str(family.num_paths),
        "written_at_a_fork": written(family, family.path_start),
        "written_at_a_reduce": written(family, family.reduce_start),
        "at_most": ", ".join(limits),
        "sampling_of_record": sampling_for_people(family),
        "prompt_of_record": prompt_for_people(family),
    }


def written(family: Family, text: str) -> str:
    """Return a text that the engine writes, in the family's own tags and on one line."""
    own = {"\n": "\\n", "{label}": "1:"}
    return "".join(own.get(piece) or family.tag(piece) for piece in pieces_of(text))


def sampling_for_people(family: Family) -> str:
    """Return the sampling of record for people."""
    values = {"temperature": family.temperature, "top_p": family.top_p}
    if family.path_repetition_penalty != 1:
        values["path_repetition_penalty"] = family.path_repetition_penalty
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if value is not None) or "none"


def prompt_for_people(family: Family) -> str:
    """Return the prompt of record for people."""
    parts: list[Any] = [family.system_prompt and f"system: {family.system_prompt}"]
    parts.append("the sentence of Multiverse-1K at the end" if family.has_suffix else None)
    return "; ".join(part for part in parts if part) or "the chat template's own"
