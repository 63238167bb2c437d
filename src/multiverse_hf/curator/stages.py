"""The five stages in order: the request of each, and the checks of its reply."""

import functools
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from pydantic import BaseModel

from multiverse_hf.curator.assembly import assemble, block_names, original_text, path_sentences, reasoning_of
from multiverse_hf.curator.checks import check_content, check_grammar, check_independence, check_paths
from multiverse_hf.curator.drafts import Draft, Refusal
from multiverse_hf.curator.forms import (
    GroupsReply,
    JudgeReply,
    MapReduceReply,
    RefillReply,
    StructureReply,
    SummaryReply,
)
from multiverse_hf.documents import parse_document
from multiverse_hf.modeling.tags import MULTIVERSE


@dataclass(frozen=True, slots=True)
class CuratorStage:
    """One call of a model.

    Attributes:
        name, version: name and version of its prompt, the file ``prompts/NAME.VERSION.txt``.
        form: form of a reply.
        variables: returns the prompt's variables for a draft.
        check: returns the draft with a result added, or raises a :class:`Refusal`.
    """

    name: str
    version: str
    form: type[BaseModel]
    variables: Callable[[Draft], dict[str, str]]
    check: Callable[[Draft, Any], Draft]

    def instructions(self, draft: Draft) -> str:
        """Return the stage's part of the request."""
        return string.Template(read_template(self.name, self.version)).substitute(self.variables(draft))


@functools.cache
def read_template(name: str, version: str) -> str:
    """Return the text of a prompt file."""
    return files("multiverse_hf.curator").joinpath("prompts", f"{name}.{version}.txt").read_text(encoding="utf-8")


# Stage 1


def check_summary(draft: Draft, result: SummaryReply) -> Draft:
    """Check the tree on its own.

    Raises:
        Refusal: if it is empty, has a step without a summary, or more steps than the text has sentences.
    """
    if not result.steps:
        raise Refusal("steps", "the tree has no step")
    for name, text in result.numbered():
        if not text.strip():
            raise Refusal("steps", f"step {name} has an empty summary")
    if len(result.leaves) > len(draft.sentences):
        raise Refusal("steps", f"{len(result.leaves)} steps for {len(draft.sentences)} sentences; join some")
    for name in result.names:
        if len(result.substeps(name)) == 1:
            raise Refusal("steps", f"step {name} has one substep only; divide a step in several or not at all")
    return replace(draft, summary=result)


# Stage 2


def check_groups(draft: Draft, result: GroupsReply) -> Draft:
    """Check the groups against the tree.

    Raises:
        Refusal: if a group names an unknown step, mixes levels, shares a step with another group, or has no argument.
            It is final if there is no group.
    """
    if not result.groups:
        raise Refusal("no parallel group", "no two steps are independent of each other", is_final=True)
    known = {name for name, _ in draft.summary.numbered()}
    seen: set[str] = set()
    for group in result.groups:
        if unknown := [name for name in group.steps if name not in known]:
            raise Refusal("groups", f"there is no step {unknown[0]}")
        if len(set(group.steps)) < 2:
            raise Refusal("groups", f"the group {group.steps} needs two different steps at least")
        if len({name.rpartition(".")[0] for name in group.steps}) > 1:
            raise Refusal("groups", f"the group {group.steps} mixes steps of several levels; group siblings only")
        if len(set(group.steps)) < len(group.steps) or seen & set(group.steps):
            twice = sorted(seen & set(group.steps)) or group.steps
            raise Refusal("groups", f"step {twice[0]} is grouped twice")
        if not group.argument.strip():
            raise Refusal("groups", f"the group {group.steps} lacks the argument for its independence")
        seen |= set(group.steps)
    return replace(draft, groups=result)


# Stage 3


def check_structure(draft: Draft, result: StructureReply) -> Draft:
    """Check that every step occurs once, in order, and that the paths of a block are of one group.

    Raises:
        Refusal: if the check fails, or there is no block.
    """
    placed = [step for part in result.parts for step in part.steps]
    _check_order([step.step for step in placed], draft.summary.names, "the document")
    for step in placed:
        inner = [name for part in step.parts for name in part.steps]
        _check_order(inner, draft.summary.substeps(step.step), f"step {step.step}")
    blocks = [[step.step for step in part.steps] for part in result.parts]
    blocks += [part.steps for step in placed for part in step.parts]
    blocks = [names for names in blocks if len(names) != 1]
    if not all(blocks):
        raise Refusal("structure", "a part has no step; leave it out")
    if not blocks:
        raise Refusal("structure", "there is no block; put the steps of a group side by side")
    for names in blocks:
        _check_independent(names, draft.groups)
    return replace(draft, structure=result)


def _check_order(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    if list(found) == list(expected):
        return
    if missing := [name for name in expected if name not in found]:
        raise Refusal("structure", f"{where} lacks step {missing[0]}")
    if unknown := [name for name in found if name not in expected]:
        raise Refusal("structure", f"{where} has no step {unknown[0]}")
    raise Refusal("structure", f"{where} has its steps as {', '.join(found)}; each once, in the order of the text")


def _check_independent(names: Sequence[str], groups: GroupsReply) -> None:
    if not any(set(names) <= set(group.steps) for group in groups.groups):
        raise Refusal("structure", f"steps {', '.join(names)} are paths of one block, but no group has them all")


# Stage 4


def ask_refill(draft: Draft) -> dict[str, str]:
    """Return the prompt's variables for a draft."""
    summaries = dict(draft.summary.numbered())
    leaves = "\n".join(f"{name}: {summaries[name]}" for name in draft.summary.leaves)
    return {"leaves": leaves, "count": str(len(draft.sentences))}


def check_refill(draft: Draft, result: RefillReply) -> Draft:
    """Check the quotes, and that their document differs from the original by at most ``max_distance``.

    The document has block names for outlines and conclusions.

    Raises:
        Refusal: if a step is unknown or has no text, a sentence is missing or quoted twice, or the distance is too
            large.
    """
    leaves, count = draft.summary.leaves, len(draft.sentences)
    owner: dict[int, str] = {}
    for quote in result.quotes:
        name = f"{quote.first}-{quote.last}"
        if quote.step not in leaves:
            raise Refusal("quotes", f"step {quote.step} has no text of its own or does not exist")
        if not 1 <= quote.first <= quote.last <= count:
            raise Refusal("quotes", f"step {quote.step} quotes {name}, but sentences run from 1 to {count}")
        for number in range(quote.first, quote.last + 1):
            if number in owner:
                raise Refusal("quotes", f"sentence {number} is quoted for step {owner[number]} and for {quote.step}")
            owner[number] = quote.step
    if empty := [name for name in leaves if name not in owner.values()]:
        raise Refusal("quotes", f"step {empty[0]} has no text")
    plain = parse_document(assemble(draft.structure, original_text(result, draft.sentences)))
    try:
        check_content(draft.trace.reasoning, reasoning_of(plain), draft.limits.max_distance)
    except Refusal as err:
        lost = [str(number) for number in range(1, count + 1) if number not in owner]
        raise Refusal(
            err.check, err.detail + (f"; in no step: sentences {', '.join(lost[:20])}" if lost else "")
        ) from err
    return replace(draft, refill=result, plain=plain)


# Stage 5

# Tags in any spelling, tokens of chat templates, and control characters.
_NO_TEXT = re.compile(
    r"</?\s*(?:"
    + "|".join({tag.strip("</>") for tag in MULTIVERSE.tokens})
    + r")\s*>|<\|[^|>\n]*\|>|[\x00-\x08\x0b-\x1f]",
    re.IGNORECASE,
)
MOST_CHARACTERS = 2000  # of an outline or a conclusion; the longest published one has 781


def ask_mapreduce(draft: Draft) -> dict[str, str]:
    """Return the prompt's variables for a draft."""
    numbered = {
        step: "".join(f"[{n}] {draft.sentences[n - 1].strip()}\n" for n in draft.refill.numbers(step))
        for step in draft.summary.leaves
    }
    return {"document": assemble(draft.structure, numbered), "blocks": ", ".join(block_names(draft.structure))}


def check_mapreduce(draft: Draft, result: MapReduceReply) -> Draft:
    """Check the whole document: its grammar, its content, the content of each path, and the paths' independence.

    Raises:
        Refusal: if a block's text is missing, a rewrite is outside all paths, or a check fails.
    """
    names = block_names(draft.structure)
    texts = {each.block: each for each in result.blocks}
    if list(texts) != list(names) or len(result.blocks) != len(names):
        raise Refusal("blocks", f"the blocks are {', '.join(names)}, got {', '.join(texts) or 'none'}; each once")
    for name, num_paths in names.items():
        if len(texts[name].outlines) != num_paths:
            raise Refusal("blocks", f"{name} has {num_paths} paths and {len(texts[name].outlines)} outlines")
    written = [each for block in result.blocks for each in (*block.outlines, block.conclusion)]
    for text in (*written, *(each.text for each in result.rewrites)):
        if match := _NO_TEXT.search(text):
            raise Refusal("blocks", f"{text!r:.80} holds {match[0]!r}; write text only")
    for text in written:
        if not any(map(str.isalnum, text)):
            raise Refusal("blocks", f"{text!r:.80} says nothing")
        if len(text) > MOST_CHARACTERS:
            raise Refusal("blocks", f"{text!r:.80} has {len(text)} characters, {MOST_CHARACTERS} at most; be brief")
    allowed = path_sentences(draft.structure, draft.refill)
    rewritten = {each.sentence: each.text for each in result.rewrites}
    if outside := sorted(rewritten.keys() - allowed):
        raise Refusal("rewrites", f"sentence {outside[0]} is in no path; only sentences of paths are rewritten")
    for number, text in rewritten.items():
        if "\\boxed" in text and "\\boxed" not in draft.sentences[number - 1]:
            raise Refusal("rewrites", f"the rewrite of sentence {number} adds a box; leave answers as they are")
    sentences = [rewritten_as(rewritten, n, sentence) for n, sentence in enumerate(draft.sentences, start=1)]
    text = assemble(draft.structure, original_text(draft.refill, sentences), texts)
    document = check_grammar(text, draft.limits.max_depth)
    path_distances = [0.0] * sum(names.values())
    if result.rewrites:
        path_distances = check_paths(draft.plain, document, draft.limits.max_distance)
    distance = check_content(draft.trace.reasoning, reasoning_of(document), draft.limits.max_distance)
    check_independence(document, draft.trace.prompt)
    return replace(draft, document=document, distance=distance, path_distances=path_distances)


def rewritten_as(rewritten: dict[int, str], number: int, sentence: str) -> str:
    """Return a sentence in its new wording, if it has one, with the old whitespace around it."""
    if number not in rewritten:
        return sentence
    text, body = rewritten[number].strip(), sentence.strip()
    begin = sentence.index(body) if body else 0
    return sentence[:begin] + text + sentence[begin + len(body) :] if text else ""


def check_judgement(draft: Draft, result: JudgeReply) -> Draft:
    """Check that the judge found no path that depends on another.

    Raises:
        Refusal: a final one, with the first dependent path.
    """
    for each in result.dependent:
        raise Refusal("judge", f"path {each.path} needs another path at {each.quote!r}: {each.reason}", is_final=True)
    return draft


STAGES = (
    CuratorStage("summary", "v1", SummaryReply, lambda draft: {"count": str(len(draft.sentences))}, check_summary),
    CuratorStage("groups", "v1", GroupsReply, lambda draft: {"tree": draft.summary.outline()}, check_groups),
    CuratorStage(
        "structure",
        "v1",
        StructureReply,
        lambda draft: {"tree": draft.summary.outline(), "groups": draft.groups.outline()},
        check_structure,
    ),
    CuratorStage("refill", "v1", RefillReply, ask_refill, check_refill),
    CuratorStage("mapreduce", "v1", MapReduceReply, ask_mapreduce, check_mapreduce),
)
# Judges the result of the last stage
JUDGE = CuratorStage(
    "judge", "v1", JudgeReply, lambda draft: {"document": draft.text}, check_judgement
)  # of the last one
SYSTEM = ("system", "v1")  # system prompt of every call


def prompt_versions() -> dict[str, str]:
    """Return the version of each prompt."""
    return dict([SYSTEM, *((stage.name, stage.version) for stage in (*STAGES, JUDGE))])
