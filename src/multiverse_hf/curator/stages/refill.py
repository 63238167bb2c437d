"""Stage 4: the original text for every step, quoted by the numbers of its sentences."""

from pydantic import BaseModel, Field

from multiverse_hf.curator.assembly import assemble, original_text, reasoning_of
from multiverse_hf.curator.checks import check_content
from multiverse_hf.curator.drafts import Draft, Refusal
from multiverse_hf.documents import parse_document


class Quote(BaseModel):
    """A run of sentences that belongs to a step."""

    step: str
    first: int = Field(description="number of the first sentence")
    last: int = Field(description="number of the last sentence, which is quoted as well")


class Refill(BaseModel):
    """The quotes of all steps that have text of their own; those of one step in the order in which they are read."""

    quotes: list[Quote]

    def numbers(self, step: str) -> list[int]:
        """Give the numbers of a step's sentences, from 1."""
        return [n for quote in self.quotes if quote.step == step for n in range(quote.first, quote.last + 1)]


def variables(draft: Draft) -> dict[str, str]:
    """Give what the prompt says of the draft."""
    summaries = dict(draft.summary.numbered())
    leaves = "\n".join(f"{name}: {summaries[name]}" for name in draft.summary.leaves)
    return {"leaves": leaves, "count": str(len(draft.sentences))}


def check(draft: Draft, result: Refill) -> None:
    """Check the quotes, and that the document they make is the original but for at most ``max_distance``.

    Leaves the document in the draft, with block names for outlines and conclusions.

    Raises:
        Refusal: if a step is unknown or without text, a sentence is not there or quoted twice, or too much is lost.
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
    sequential = reasoning_of(plain)
    try:
        check_content(draft.trace.reasoning, sequential, draft.limits.max_distance)
    except Refusal as err:
        lost = [str(number) for number in range(1, count + 1) if number not in owner]
        raise Refusal(
            err.check, err.detail + (f"; in no step: sentences {', '.join(lost[:20])}" if lost else "")
        ) from err
    draft.plain, draft.sequential = plain, sequential
