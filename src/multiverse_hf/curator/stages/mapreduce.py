"""Stage 5: outlines and conclusions of every block, and paths that stand alone. What it gives is the document."""

import re

from pydantic import BaseModel, Field

from multiverse_hf.curator.assembly import assemble, block_names, original_text, path_sentences, reasoning_of
from multiverse_hf.curator.checks import check_content, check_grammar, check_independence, check_paths
from multiverse_hf.curator.drafts import Draft, Refusal
from multiverse_hf.modeling.tags import MULTIVERSE

# Tags, however they are spelled, tokens of chat templates, and characters that no text has.
_NO_TEXT = re.compile(
    r"</?\s*(?:"
    + "|".join({tag.strip("</>") for tag in MULTIVERSE.tokens})
    + r")\s*>|<\|[^|>\n]*\|>|[\x00-\x08\x0b-\x1f]",
    re.IGNORECASE,
)
MOST_CHARACTERS = 2000  # of an outline or a conclusion, a sentence or two; the longest of the published has 781


class BlockText(BaseModel):
    """What a block says besides its paths."""

    block: str = Field(description="its name, such as B1")
    outlines: list[str] = Field(description="for each path in order, what it is to find out; without a number")
    conclusion: str = Field(description="what the paths found, together")


class Rewrite(BaseModel):
    """Another wording for one sentence of a path."""

    sentence: int
    text: str = Field(description="the sentence without reference to another path; empty to drop it")


class MapReduce(BaseModel):
    """The text of every block, and the sentences that have to change for paths to stand alone."""

    blocks: list[BlockText]
    rewrites: list[Rewrite]


def variables(draft: Draft) -> dict[str, str]:
    """Give what the prompt says of the draft."""
    numbered = {
        step: "".join(f"[{n}] {draft.sentences[n - 1].strip()}\n" for n in draft.refill.numbers(step))
        for step in draft.summary.leaves
    }
    return {"document": assemble(draft.structure, numbered), "blocks": ", ".join(block_names(draft.structure))}


def check(draft: Draft, result: MapReduce) -> None:
    """Check the whole document: its grammar, its content and that of each path, and that paths stand alone.

    Leaves the document and its distances in the draft.

    Raises:
        Refusal: if a block's text is missing, a rewrite is out of place, or a check fails.
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
    sequential = reasoning_of(document)
    path_distances = [0.0] * sum(names.values())
    if result.rewrites:
        path_distances = check_paths(draft.plain, document, draft.limits.max_distance)
    distance = check_content(draft.trace.reasoning, sequential, draft.limits.max_distance)
    check_independence(document, draft.trace.prompt)
    draft.document, draft.text, draft.sequential = document, text, sequential
    draft.distance, draft.path_distances = distance, path_distances


def rewritten_as(rewritten: dict[int, str], number: int, sentence: str) -> str:
    """Give a sentence in its new wording, if it has one, with the whitespace that stood around the old one."""
    if number not in rewritten:
        return sentence
    text, body = rewritten[number].strip(), sentence.strip()
    begin = sentence.index(body) if body else 0
    return sentence[:begin] + text + sentence[begin + len(body) :] if text else ""
