"""OpenAI's frequency and presence penalties, which transformers does not have."""

import torch
from transformers import LogitsProcessor


class CountPenalty(LogitsProcessor):
    """Lowers the scores of tokens that stand in the answer: what a branch sees of it, the prompt excluded.

    Args:
        prompt_length: tokens of the prompt.
        frequency: taken off for each time that a token stands there.
        presence: taken off once.
    """

    is_stateless = True

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return (N, V) scores for (N, L) ids."""
        answer = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)
