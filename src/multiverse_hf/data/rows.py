"""From a prompt and a document to the token ids and labels of a training row."""

from typing import Any

from multiverse_hf.modeling.interpreter import Structure
from multiverse_hf.modeling.layout import Event
from multiverse_hf.modeling.tags import TagSet, encode_prompt

IGNORE = -100


def document_labels(ids: list[int], tags: TagSet) -> list[int]:
    """Give the labels of a document: what the model must choose, nothing else.

    Tokens the engine writes itself, ``\\n<Path>\\n1:`` at a fork and ``\\n<Conclusion>\\n`` at a reduce, are ignored,
    and so is the first token of every path and of what follows a block, which in document order has no meaningful
    predecessor.

    Args:
        ids: token ids of the document.
        tags: the control tags.

    Returns:
        As many labels as ids, :data:`IGNORE` where nothing is to be learnt.
    """
    labels, structure = list(ids), Structure(tags)
    for index, token in enumerate(ids):
        event = structure.feed(token)
        if event is Event.TEXT:
            continue
        if event is Event.REDUCE:
            prefix = tags.conclusion_prefix()
        else:
            prefix = structure.path_prefix(structure.scanner.open_blocks[-1].path)
        length = 1
        while length < len(prefix) and ids[index + 1 : index + 2 + length] == prefix[: length + 1]:
            length += 1
        for forced in range(index + 1, min(index + 1 + length, len(ids))):
            labels[forced] = IGNORE
    return labels


def encode_row(
    tokenizer: Any, tags: TagSet, prompt: str | list[dict[str, str]], document: str, plain: bool = False
) -> dict[str, Any]:
    """Tokenize a training row: the prompt in the chat template, the document, the end token.

    Args:
        tokenizer: a transformers tokenizer with the tags.
        tags: the control tags.
        prompt: the user's text, or chat messages.
        document: the answer.
        plain: the row is to be read as plain causal text, every token of the document chosen by the model.

    Returns:
        ``input_ids`` and ``labels``, lists of the same length, and ``plain``.
    """
    prompt_ids = encode_prompt(tokenizer, prompt, tags.names)
    document_ids = tokenizer.encode(document, add_special_tokens=False)
    labels = document_ids if plain else document_labels(document_ids, tags)
    end = [tokenizer.eos_token_id]
    return {
        "input_ids": prompt_ids + document_ids + end,
        "labels": [IGNORE] * len(prompt_ids) + labels + end,
        "plain": plain,
    }
