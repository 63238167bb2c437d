"""Counts of a curation, added row by row in constant memory."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from multiverse_hf.curator.options import Settings
from multiverse_hf.curator.stages import STAGES

DISTANCE_STEP, PARALLELISM_STEP = 0.005, 0.1  # widths of the histograms' bins


@dataclass
class Tally:
    """Counts of a run.

    Attributes:
        rejected: rejected rows by stage and check.
        reached, passed: rows that reached a stage, and rows that passed it.
        asked, checks: replies by stage, and refused replies by stage and check.
        tokens, judge_tokens: tokens of prompts and completions.
        distances, path_distances, parallelism: histograms by number of the bin.
    """

    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    reached: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    judge_tokens: Counter[str] = field(default_factory=Counter)
    distances: Counter[int] = field(default_factory=Counter)
    path_distances: Counter[int] = field(default_factory=Counter)
    parallelism: Counter[int] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """All rows."""
        return self.accepted + self.rejected.total()

    def add(self, outcome: dict[str, Any]) -> None:
        """Add a line of a part."""
        row = outcome["row"]
        attempts = row["provenance"]["attempts"] if outcome["accepted"] else row["attempts"]
        for each in attempts:
            self.asked[each["stage"]] += 1
            if each["check"] is not None:
                self.checks[f"{each['stage']}: {each['check']}"] += 1
            counter = self.judge_tokens if each["stage"] == "judge" else self.tokens
            for kind in ("prompt", "completion"):
                counter[kind] += each[f"{kind}_tokens"]
        if outcome["accepted"]:
            self.accepted += 1
            self._measure(row["provenance"])
        else:
            self.rejected[f"{row['stage']}: {row['check']}"] += 1
        for stage in (stage.name for stage in STAGES):
            if not any(each["stage"] == stage for each in attempts):
                break
            self.reached[stage] += 1
            self.passed[stage] += outcome["accepted"] or row["stage"] != stage

    def _measure(self, provenance: dict[str, Any]) -> None:
        self.distances[int(provenance["distance"] / DISTANCE_STEP)] += 1
        for distance in provenance["path_distances"]:
            self.path_distances[int(distance / DISTANCE_STEP)] += 1
        self.parallelism[int(provenance["parallelism"] / PARALLELISM_STEP)] += 1

    def cost(self, settings: Settings) -> float | None:
        """Return the cost of all replies in US dollars; None if a price is missing."""
        costs = [settings.cost(settings.model, self.tokens["prompt"], self.tokens["completion"])]
        if (judge := settings.judge_name) is not None:
            costs.append(settings.cost(judge, self.judge_tokens["prompt"], self.judge_tokens["completion"]))
        return None if None in costs else sum(costs)

    @classmethod
    def from_dict(cls, counts: dict[str, Any]) -> "Tally":
        """Return the tally of a summary."""
        tally = cls(counts["accepted"])
        for name, counter in vars(tally).items():
            if isinstance(counter, Counter):
                is_histogram = name in ("distances", "path_distances", "parallelism")
                counter.update({int(key) if is_histogram else key: count for key, count in counts[name].items()})
        return tally

    def to_dict(self, settings: Settings) -> dict[str, Any]:
        """Return all counts, as in the summary."""
        counts = {name: dict(value) if isinstance(value, Counter) else value for name, value in vars(self).items()}
        return {"rows": self.rows, **counts, "cost": self.cost(settings)}
