"""A second opinion on the last stage, if it is asked for: does each path stand alone?"""

from pydantic import BaseModel, Field

from multiverse_hf.curator.drafts import Draft, Refusal


class Dependence(BaseModel):
    """A place where a path leans on a sibling."""

    path: str = Field(description="its label, such as 2 or 1.3")
    quote: str = Field(description="the words that lean on another path")
    reason: str = Field(description="what of which path they need")


class Judgement(BaseModel):
    """All such places; none if every path stands alone."""

    dependent: list[Dependence]


def variables(draft: Draft) -> dict[str, str]:
    """Give what the prompt says of the draft."""
    return {"document": draft.text}


def check(draft: Draft, result: Judgement) -> None:
    """Refuse the document for good if a path leans on another.

    Raises:
        Refusal: then, with the first place.
    """
    for each in result.dependent:
        raise Refusal("judge", f"path {each.path} needs another path at {each.quote!r}: {each.reason}", is_final=True)
