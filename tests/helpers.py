"""Tiny random models, a tag set without a tokenizer, and processors that force a structure."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, LogitsProcessor, PreTrainedModel

from multiverse_hf.modeling.layout import build_layout
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.tags import MULTIVERSE, TagSet

VOCAB = 96
PAD, EOS, NEWLINE, COLON, DOT = 0, 1, 2, 3, 4
DIGITS = {str(digit): 5 + digit for digit in range(10)}
FIRST_TEXT = 40  # ids from here on are text


def make_tags(names=MULTIVERSE) -> TagSet:
    """A tag set over made-up ids."""
    ids = {tag: 16 + number for number, tag in enumerate(names.tokens)}
    digits = {digit: [token] for digit, token in DIGITS.items()} | {".": [DOT]}
    pieces = {token: digit for digit, token in DIGITS.items()} | {COLON: ":", DOT: ".", NEWLINE: " "}
    return TagSet(names, ids, [NEWLINE], [COLON], digits, pieces)


TAGS = make_tags()

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
ARCHITECTURES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": 24},
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 8,
    },
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "glm4": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
}


def tiny_config(name: str):
    return AutoConfig.for_model(name, **(_SIZES | ARCHITECTURES[name]))


def tiny_model(name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A random model whose logits are spread out, so that greedy choices have no ties."""
    torch.manual_seed(seed)
    model = MultiverseForCausalLM.from_config(tiny_config(name), TAGS, attn_implementation=attn, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class Forced:
    """A block of a plan: one plan a path. ``labelled`` writes labels in the outlines."""

    paths: tuple
    labelled: bool = True


# A plan is a tuple of items: an int (that many free tokens), a Forced block, or "eos".


class FollowPlan(LogitsProcessor):
    """Forces a plan. It knows the branch by the ids it is shown alone: the branch's own visible ones.

    Free tokens are left to the model: any text id, no tag, no end token.
    """

    def __init__(self, plans: dict[tuple, tuple] | tuple, prompt_length: int | None = None, tags: TagSet = TAGS) -> None:
        self.plans, self.prompt_length, self.tags = plans, prompt_length, tags

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        out = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            if isinstance(self.plans, dict):
                prompt = next(prompt for prompt in self.plans if tuple(ids[: len(prompt)]) == prompt)
                plan, begin = self.plans[prompt], len(prompt)
            else:
                plan, begin = self.plans, self.prompt_length
            found = self._follow(plan, ids, begin, ())
            token = EOS if isinstance(found, int) else found[0]
            if token is None:
                out[row, FIRST_TEXT:] = scores[row, FIRST_TEXT:]
            else:
                out[row, token] = scores[row, token]
        return out

    def _follow(self, plan: tuple, ids: list[int], at: int, label: tuple[int, ...]):
        """Walk the ids along the plan: the next token in a tuple (None if free), or where the plan's end stands."""
        tags = self.tags
        for item in plan:
            if item == "eos":
                return (EOS,)
            if isinstance(item, int):
                for _ in range(item):
                    if at == len(ids):
                        return (None,)
                    at += 1
                continue
            labels = [(*label, path + 1) for path in range(len(item.paths))]
            spelled = [self._spell(each) if item.labelled else tags.ordinal(each[-1]) for each in labels]
            head = [tags.open("parallel"), tags.open("goal")]
            for text in spelled:
                head += [tags.open("outline"), *(text if item.labelled else []), FIRST_TEXT, tags.close("outline")]
            for token in [*head, tags.close("goal")]:
                if at == len(ids):
                    return (token,)
                assert ids[at] == token, f"expected {token} at {at}, got {ids}"
                at += 1
            while True:
                path = next(
                    p
                    for p, text in enumerate(spelled)
                    if ids[at : at + 3 + len(text)] == tags.path_prefix(text)
                )
                found = self._follow(item.paths[path], ids, at + len(tags.path_prefix(spelled[path])), labels[path])
                if not isinstance(found, int):
                    return found
                if found == len(ids):
                    return (tags.close("path"),)
                at = found + 1
                if path == len(item.paths) - 1:
                    break
            at += len(tags.conclusion_prefix())
            for token in (None, tags.close("conclusion"), tags.close("parallel")):
                if at == len(ids):
                    return (token,)
                at += 1
        return at

    def _spell(self, label: tuple[int, ...]) -> list[int]:
        text = ".".join(map(str, label))
        return [token for char in text for token in self.tags.digits[char]] + self.tags.colon


def replay_error(model: PreTrainedModel, output, prompt_width: int, attention_mask: torch.Tensor) -> float:
    """Largest difference between the logits each sampled token was chosen from, and those of one pass over the document."""
    sequences, sampled = output.sequences, output.sampled_mask
    answers = torch.zeros_like(sequences[:, prompt_width:])
    for row, stats in enumerate(output.stats):
        answers[row, : stats.num_tokens] = 1
    mask = torch.cat([attention_mask, answers], dim=1)
    with torch.no_grad():
        logits = model(input_ids=sequences, attention_mask=mask).logits
    worst = 0.0
    for row, column in sampled.nonzero().tolist():
        chosen_from = output.logits[column - prompt_width][row]
        worst = max(worst, (chosen_from - logits[row, column - 1]).abs().max().item())
    return worst


def layout_of(ids: list[int], tags: TagSet = TAGS):
    return build_layout(ids, tags)
