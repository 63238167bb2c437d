"""From logits to tokens: transformers' own processors, each branch with its own context, and keyed noise."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Processors that do not look at the context may be run on all branches at once, whatever their lengths.
_CONTEXT_FREE = (MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper)

_MASK64 = (1 << 64) - 1


def mix(*parts: int) -> int:
    """Hash integers to one of 64 bits (splitmix64 finaliser over each part in turn)."""
    state = 0
    for part in parts:
        state = (state ^ (part & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return state


def sequence_key(prompt: Sequence[int], occurrence: int) -> int:
    """Give the noise key of a sequence: its prompt, and which of the equal prompts of the request it is."""
    digest = hashlib.blake2b(",".join(map(str, prompt)).encode(), digest_size=8).digest()
    return mix(int.from_bytes(digest, "little"), occurrence)


class Sampler:
    """Chooses the next token of each branch.

    Noise is keyed by (seed, sequence, branch, position), so a token does not depend on what else is in the batch or on
    when it was scheduled.

    Args:
        processors: transformers logits processors and warpers, in order.
        do_sample: draw from the distribution; otherwise take its maximum.
        seed: of the noise.
    """

    def __init__(self, processors: LogitsProcessorList, do_sample: bool, seed: int) -> None:
        self.processors = processors
        self.do_sample = do_sample
        self.seed = seed
        self.needs_context = any(not isinstance(p, _CONTEXT_FREE) for p in processors)

    def __call__(
        self,
        logits: torch.Tensor,
        contexts: Sequence[Sequence[int]] | None,
        forbidden: Sequence[Iterable[int]],
        keys: Sequence[tuple[int, int, int]],
    ) -> tuple[list[int], torch.Tensor]:
        """Choose one token a row.

        Args:
            logits: (N, V), as the model gave them; not written to.
            contexts: for each row the visible ids in document order; needed if ``needs_context``.
            forbidden: for each row, ids that may not be chosen.
            keys: for each row its (sequence, branch, position).

        Returns:
            N token ids, and the processed scores (N, V).

        Raises:
            ValueError: if nothing is left to choose from in a row.
        """
        pairs = [(row, token) for row, tokens in enumerate(forbidden) for token in tokens]
        rows = torch.tensor([row for row, _ in pairs], dtype=torch.long, device=logits.device)
        columns = torch.tensor([token for _, token in pairs], dtype=torch.long, device=logits.device)

        scores = logits.clone()
        if pairs:
            scores[rows, columns] = -torch.inf
        if self.processors:
            if self.needs_context:
                if contexts is None:
                    raise ValueError("these logits processors look at the context; pass contexts")
                scores = self._process_by_length(scores, contexts)
            else:
                scores = self.processors(None, scores)
            if pairs:
                scores[rows, columns] = -torch.inf
        if self.do_sample:
            tokens = self._draw(scores, keys)
        else:
            best, tokens = scores.max(dim=-1)
            if self.processors and bool(torch.isneginf(best).any()):
                self._refuse(int(torch.isneginf(best).nonzero()[0]), forbidden)
        return tokens.tolist(), scores

    def _process_by_length(self, scores: torch.Tensor, contexts: Sequence[Sequence[int]]) -> torch.Tensor:
        groups: dict[int, list[int]] = defaultdict(list)
        for row, context in enumerate(contexts):
            groups[len(context)].append(row)
        out = torch.empty_like(scores)
        for rows in groups.values():
            ids = torch.tensor([contexts[row] for row in rows], dtype=torch.long, device=scores.device)
            out[rows] = self.processors(ids, scores[rows])
        return out

    def _draw(self, scores: torch.Tensor, keys: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Invert the distribution function at keyed uniforms."""
        uniform = torch.tensor([(mix(self.seed, *key) >> 11) * 2.0**-53 for key in keys], dtype=torch.float64)
        probabilities = torch.softmax(scores.double(), dim=-1)
        if bool(probabilities.isnan().any()):
            self._refuse(int(probabilities.isnan().any(-1).nonzero()[0]), None)
        cumulative = probabilities.cumsum(-1)
        target = uniform.to(scores.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
        # rounding may carry the target to the end, past the last token with any probability
        last = scores.shape[-1] - 1 - torch.flip(probabilities > 0, [-1]).int().argmax(-1)
        return torch.minimum(tokens, last)

    @staticmethod
    def _refuse(row: int, forbidden: Sequence[Iterable[int]] | None) -> None:
        tags = sorted(forbidden[row]) if forbidden is not None else "the tags the grammar does not allow"
        raise ValueError(
            f"no token is left to choose: the logits processors leave only ids that structure forbids here ({tags}); "
            "use structure='lenient', or let the processor allow what the grammar allows"
        )
