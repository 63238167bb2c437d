"""Families: what checkpoints of one kind agree on, as data.

A :class:`Family` holds the names of the control tags, the rules of a block, the text that the engine writes, limits,
and the prompt and sampling of record. Grammar, layout, labels and engine read it; none of them knows a family by name.
Imports no torch.
"""

import functools
import re
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

ROLES = ("think", "parallel", "goal", "outline", "path", "conclusion")
_PIECE = re.compile(r"\n|</?[a-z]+>|\{label\}")


@functools.cache
def pieces_of(text: str) -> tuple[str, ...]:
    """Return the pieces of a text that the engine writes: newlines, tags by role, and the place of the label.

    Raises:
        ValueError: if it holds anything else.
    """
    pieces = tuple(_PIECE.findall(text))
    if "".join(pieces) != text or any(piece[0] == "<" and piece.strip("</>") not in ROLES for piece in pieces):
        raise ValueError(f"the engine writes newlines, tags such as <path>, and {{label}}; got {text!r}")
    return pieces


@dataclass(frozen=True, slots=True)
class Family:
    """What the checkpoints of one kind agree on. The defaults are those of Multiverse.

    Texts that the engine writes name tags by their role: ``<path>`` stands for the family's own open tag of a path.

    Args:
        think, parallel, goal, outline, path, conclusion: names of the tags; None for a tag that the family lacks.
            Without ``parallel``, a block begins at the goal's open tag. Without ``goal`` and ``outline``, the open tag
            of ``parallel`` opens the paths, and no path has a label.
        num_paths: number of paths of each block where there are no outlines.
        path_start: text that the engine writes where a path begins; ``{label}`` is the label of its outline.
        reduce_start: text that the engine writes after the last path.
        ending: tags that follow the paths of a block, in order. Text may stand in the conclusion only.
        max_paths: most outlines of a block, unless a call says otherwise; so are the next two.
        max_depth: most blocks around a token.
        max_blocks: most blocks of an answer, those in other paths not counted; None for any number.
        temperature, top_p: sampling of record; None where there is none.
        path_repetition_penalty: of record, for the tokens of a path against that path's own.
        system_prompt: system message of record; None where the chat template or the user has to bring it.
        has_suffix: whether a prompt of record ends with a sentence of Multiverse-1K.
        name: what people call it.
    """

    think: str | None = "Think"
    parallel: str | None = "Parallel"
    goal: str | None = "Goal"
    outline: str | None = "Outline"
    path: str = "Path"
    conclusion: str | None = "Conclusion"
    num_paths: int | None = None
    path_start: str = "\n<path>\n{label}"
    reduce_start: str = "\n<conclusion>\n"
    ending: tuple[str, ...] = ("<conclusion>", "</conclusion>", "</parallel>")
    max_paths: int = 16
    max_depth: int = 4
    max_blocks: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    path_repetition_penalty: float = 1.0
    system_prompt: str | None = None
    has_suffix: bool = False
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        names = [name for _, name in self.items()]
        for name in names:
            if not re.fullmatch(r"[A-Za-z_][\w-]*", name):
                raise ValueError(f"a tag name is a word such as 'Goal', got {name!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"tag names must differ from each other, got {names}")
        roles = [role for role, _ in self.items()]
        if ("goal" in roles) != ("outline" in roles):
            raise ValueError("a family has goal and outline, or neither; give both names, or None for both")
        if ("goal" in roles) == (self.num_paths is not None):
            raise ValueError(
                f"num_paths is for families without outlines, which need it; got num_paths={self.num_paths!r} and "
                f"outline={self.outline!r}"
            )
        if "goal" not in roles and (self.parallel is None or self.num_paths < 1):
            raise ValueError("without outlines, the parallel tag opens one path or more; give parallel and num_paths")
        object.__setattr__(self, "ending", tuple(tag for tag in self.ending if tag.strip("</>") in roles))
        for text, written in (("path_start", ["<path>"]), ("reduce_start", list(self.ending))):
            tags = [piece for piece in pieces_of(getattr(self, text)) if piece[0] == "<"]
            if tags != written[: len(tags)] or (text == "path_start" and not tags):
                raise ValueError(f"{text} writes {' '.join(written)} in this order, got {getattr(self, text)!r}")
        if not self.reduce_start or not self.ending:
            raise ValueError("a block ends with one tag or more, and the engine begins what follows; see Family")
        if "{label}" in self.path_start and self.outline is None:
            raise ValueError("labels come from outlines, which the family lacks; leave {label} out of path_start")

    def items(self) -> Iterator[tuple[str, str]]:
        """Return (role, name) for every tag this family has, in :data:`ROLES` order."""
        for role in ROLES:
            name = getattr(self, role)
            if name is not None:
                yield role, name

    def open(self, role: str) -> str:
        """Return the open tag of a role, e.g. ``<Goal>``."""
        return f"<{getattr(self, role)}>"

    def close(self, role: str) -> str:
        """Return the close tag of a role, e.g. ``</Goal>``."""
        return f"</{getattr(self, role)}>"

    def tag(self, tag: str) -> str:
        """Return the family's own tag for one named by its role: ``<Goal>`` for ``<goal>``."""
        role = tag.strip("</>")
        return self.close(role) if tag[1] == "/" else self.open(role)

    @property
    def tokens(self) -> list[str]:
        """All tags, open and close, in :data:`ROLES` order."""
        return [tag for role, _ in self.items() for tag in (self.open(role), self.close(role))]

    @property
    def opener(self) -> str:
        """The tag a block begins with."""
        return self.open("goal" if self.parallel is None else "parallel")

    @property
    def trigger(self) -> str:
        """The tag that opens the paths of a block."""
        return self.open("parallel") if self.goal is None else self.close("goal")

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling of record, as options of ``generate``; empty where there is none."""
        if self.temperature is None:
            return {}
        options = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.path_repetition_penalty != 1:
            options["path_repetition_penalty"] = self.path_repetition_penalty
        return {name: value for name, value in options.items() if value is not None}

    def is_in(self, text: str) -> bool:
        """Return whether a text has the tags of a block: the one that opens its paths, and the last one."""
        return self.trigger in text and self.tag(self.ending[-1]) in text

    @property
    def num_started(self) -> int:
        """Tags of the ending that the engine writes."""
        return self.reduce_start.count("<")

    @property
    def limits(self) -> dict[str, int | None]:
        """Options of ``generate`` where a call does not say."""
        return {name: getattr(self, name) for name in ("max_paths", "max_depth", "max_blocks")}

    def rules(self) -> dict[str, Any]:
        """Return everything but the names of the tags, as JSON."""
        return {name: value for name, value in asdict(self).items() if name not in ROLES}

    @classmethod
    def from_rules(cls, names: dict[str, str | None], rules: dict[str, Any] | None) -> "Family":
        """Return the family of a checkpoint.

        Args:
            names: the name of each role's tag.
            rules: as :meth:`rules` returned them. None, in a checkpoint of before they were data, stands for those of
                the known family with these names, or Multiverse's.
        """
        if rules is None:
            known = (family for family in FAMILIES.values() if all(getattr(family, r) == names.get(r) for r in ROLES))
            return next(known, None) or cls(**names)
        known_rules = {each.name for each in fields(cls)}  # a later version may have more
        kept = {name: value for name, value in rules.items() if name in known_rules}
        return cls(**names, **kept | {"ending": tuple(rules["ending"])})


MULTIVERSE = Family(temperature=0.6, top_p=0.95, has_suffix=True, name="multiverse")
NPR = Family(
    *(None, None, "guideline", "plan", "step", "takeaway"),
    max_paths=5,
    max_depth=1,
    temperature=1.0,
    top_p=0.7,
    path_repetition_penalty=1.02,
    name="npr",
)
# Its authors' engine gives the paths one position to begin at, and what follows them one past the farthest: the layout
# of all families here. Paths differ by their noise alone, so they are the same under greedy decoding.
PARALLEL_R1 = Family(
    *(None, "Parallel", None, None, "Path", "Summary"),
    num_paths=2,
    path_start="<path>",
    reduce_start="</parallel>\n<conclusion>",
    ending=("</parallel>", "<conclusion>", "</conclusion>"),
    max_paths=2,
    max_depth=1,
    max_blocks=4,
    temperature=1.0,
    name="parallel-r1",
)
FAMILIES = {family.name: family for family in (MULTIVERSE, NPR, PARALLEL_R1)}


def find_family(vocab: Collection[str]) -> Family:
    """Return the first known family all of whose tags are tokens, :data:`MULTIVERSE` if there is none."""
    return next((family for family in FAMILIES.values() if all(tag in vocab for tag in family.tokens)), MULTIVERSE)


def read_family(family: Family | str) -> Family:
    """Return a family given by itself or by its name.

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(family, Family):
        return family
    if family not in FAMILIES:
        raise ValueError(f"unknown tag family {family!r}; choose one of {', '.join(FAMILIES)} or pass a Family")
    return FAMILIES[family]
