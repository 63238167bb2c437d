"""Tiny random models, a tag set without a tokenizer, and processors that force a structure."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from transformers import AutoConfig, LogitsProcessor, PreTrainedModel

from multiverse_hf.modeling.grammar import Event, Scanner
from multiverse_hf.modeling.layout import build_layout, has_block
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
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "experts_implementation": "eager",  # the other ones have no float64
    },
}

CORE = ("qwen2", "gemma3_text", "qwen3_moe")  # full attention, sliding windows, experts


def slow_unless(core: Iterable, values: Iterable) -> list:
    """Parameters of a test, those outside ``core`` marked slow."""
    return [value if value in core else pytest.param(value, marks=pytest.mark.slow) for value in values]


EVERY_ARCHITECTURE = slow_unless(CORE, ARCHITECTURES)


def tiny_config(name: str, **settings):
    return AutoConfig.for_model(name, **(_SIZES | ARCHITECTURES[name] | settings))


def tiny_model(
    name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float64, seed: int = 0, **settings
) -> PreTrainedModel:
    """A random model whose logits are spread out, so that greedy choices have no ties."""
    torch.manual_seed(seed)
    config = tiny_config(name, **settings)
    model = MultiverseForCausalLM.from_config(config, TAGS, attn_implementation=attn, dtype=torch.float32)
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

    Free tokens are left to the model: any text id, no tag, no end token. What a limit closed early, or does not let
    begin, is passed over.
    """

    def __init__(
        self, plans: dict[tuple, tuple] | tuple, prompt_length: int | None = None, tags: TagSet = TAGS
    ) -> None:
        self.plans, self.prompt_length, self.tags = plans, prompt_length, tags

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        out = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            if ids[-1] in (PAD, EOS):  # finished, or forked
                continue
            while ids[0] == PAD:
                ids.pop(0)
            if isinstance(self.plans, dict):
                prompt = next(prompt for prompt in self.plans if tuple(ids[: len(prompt)]) == prompt)
                plan, begin = self.plans[prompt], len(prompt)
            else:
                plan, begin = self.plans, self.prompt_length
            token = self._next(plan, ids[begin:])
            if token is not None and scores[row, token] == -torch.inf:  # a limit forbids it
                token = self.tags.close("goal") if token == self.tags.open("outline") else None
            if token is None:
                out[row, FIRST_TEXT:] = scores[row, FIRST_TEXT:]
            else:
                out[row, token] = scores[row, token]
        return out

    def __deepcopy__(self, memo: dict) -> "FollowPlan":
        return self  # it keeps no state

    def _next(self, plan: tuple, ids: list[int]) -> int | None:
        """Walk the ids along the plan and give the next token, None if it is free."""
        stack: list[_Place | _InBlock] = [_Place(plan, ())]
        for token in ids:
            top = stack[-1]
            if isinstance(top, _Place):
                if token == self.tags.open("parallel"):
                    item, top.done = next(
                        (item, at + 1)
                        for at, item in enumerate(top.plan)
                        if at >= top.done and isinstance(item, Forced)
                    )
                    top.num_free = 0
                    stack.append(_InBlock(item, top.label))
                elif token == self.tags.close("path"):
                    stack.pop()
                elif token >= FIRST_TEXT:
                    top.skip_done()
                    top.num_free += 1
            elif top.read(token, self.tags):
                stack.append(_Place(top.path(), (*top.label, top.number)))
            elif token == self.tags.close("parallel"):
                stack.pop()
        top = stack[-1]
        if isinstance(top, _InBlock):
            return top.next(self.tags)
        top.skip_done()
        if top.done == len(top.plan):
            return EOS if len(stack) == 1 else self.tags.close("path")
        item = top.plan[top.done]
        if isinstance(item, Forced):
            return self.tags.open("parallel")
        return EOS if item == "eos" else None


@dataclass
class _Place:
    """Where a walk stands in a path's plan."""

    plan: tuple
    label: tuple[int, ...]
    done: int = 0  # items
    num_free: int = 0  # free tokens of the item at hand

    def skip_done(self) -> None:
        while self.done < len(self.plan) and isinstance(self.plan[self.done], int):
            if self.num_free < self.plan[self.done]:
                return
            self.done, self.num_free = self.done + 1, 0


@dataclass
class _InBlock:
    """Where a walk stands between the paths of a block."""

    block: Forced
    label: tuple[int, ...]
    head: list[int] | None = None  # of the goal, as far as written
    number: int = 0  # of the path read last
    stage: str = "goal"
    num_free: int = 0
    begun: list[int] | None = None  # the label of a path that begins

    def read(self, token: int, tags: TagSet) -> bool:
        """Take a token; say whether a path's own text begins after it."""
        self.head = self.head or []
        if self.stage == "goal":
            self.head.append(token)
            self.stage = "paths" if token == tags.close("goal") else "goal"
        elif self.begun is not None:
            self.begun.append(token)
            if token == COLON:
                text = "".join(tags.label_pieces[each] for each in self.begun[:-1]).strip()
                self.number, self.begun = int(text.split(".")[-1]), None
                return True
        elif token == tags.open("path"):
            self.begun = []
        elif token in (tags.open("conclusion"), tags.close("conclusion")):
            self.stage = "conclusion" if token == tags.open("conclusion") else "concluded"
        elif token >= FIRST_TEXT:
            self.num_free += 1
        return False

    def path(self) -> tuple:
        return self.block.paths[self.number - 1] if self.number <= len(self.block.paths) else ()

    def next(self, tags: TagSet) -> int | None:
        if self.stage == "goal":
            head = [tags.open("goal")]
            for path in range(len(self.block.paths)):
                label = spell((*self.label, path + 1), tags) if self.block.labelled else []
                head += [tags.open("outline"), *label, FIRST_TEXT, tags.close("outline")]
            return [*head, tags.close("goal")][len(self.head or [])]
        if self.stage == "concluded":
            return tags.close("parallel")
        return tags.close("conclusion") if self.num_free else None


def spell(label: tuple[int, ...], tags: TagSet = TAGS) -> list[int]:
    """Give the ids of e.g. ``2.1:``."""
    text = ".".join(map(str, label))
    return [token for char in text for token in tags.digits[char]] + tags.colon


@contextlib.contextmanager
def exact_softmax() -> Iterator[None]:
    """Keep a softmax over float64 in float64: eager attention in transformers asks for float32 whatever the dtype."""
    softmax = torch.nn.functional.softmax

    def exact(input, *args, dtype=None, **kwargs):
        return softmax(input, *args, dtype=torch.float64 if input.dtype == torch.float64 else dtype, **kwargs)

    with patch.object(torch.nn.functional, "softmax", exact):
        yield


def replay_error(model: PreTrainedModel, output, prompt_width: int, attention_mask: torch.Tensor) -> float:
    """Largest difference between the logits each token was chosen from and those of one pass over the document."""
    sequences, sampled = output.sequences, output.sampled_mask
    answers = torch.zeros_like(sequences[:, prompt_width:])
    for row, stats in enumerate(output.stats):
        answers[row, : stats.num_tokens] = 1
    mask = torch.cat([attention_mask, answers], dim=1)
    options = {}
    if not any(has_block(row[keep != 0], model.tags) for row, keep in zip(sequences, mask, strict=True)):
        # The base model alone counts padding as positions, and its rotary angles are float32 whatever the dtype.
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=sequences, attention_mask=mask, **options).logits
    worst = 0.0
    for row, column in sampled.nonzero().tolist():
        chosen_from = output.logits[column - prompt_width][row]
        worst = max(worst, (chosen_from - logits[row, column - 1]).abs().max().item())
    return worst


def layout_of(ids: list[int], tags: TagSet = TAGS):
    return build_layout(ids, tags)


def longest_path(ids: list[int], tags: TagSet = TAGS) -> int:
    """Give the most positions any path takes, counted from its fork, with what is nested in it."""
    scanner, forks, longest = Scanner(tags), [], 0
    for token, position in zip(ids, build_layout(ids, tags).position_ids.tolist(), strict=True):
        event = scanner.feed(token)
        longest = max([longest, *(position - fork for fork in forks)])
        if event is Event.FORK:
            forks.append(position)
        elif event is Event.REDUCE:
            forks.pop()
    return longest


def left_pad(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Give ids and attention mask of a batch, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def answer(model: PreTrainedModel, prompts: list[list[int]], plans=None, **kwargs):
    """Generate with everything that is returned; plans by prompt (a tuple), if any are forced."""
    ids, mask = left_pad(prompts)
    processors = kwargs.pop("logits_processor", [])
    if plans is not None:
        processors = [FollowPlan(plans), *processors]
    kwargs = {"max_new_tokens": 400, "do_sample": False, "output_logits": True} | kwargs
    return model.generate(
        ids,
        attention_mask=mask,
        logits_processor=processors,
        return_dict_in_generate=True,
        **kwargs,
    )


def documents(output, prompts: list[list[int]], copies: int = 1) -> list[list[int]]:
    """Give prompt and answer of every row, without padding."""
    width = max(map(len, prompts))
    rows = zip(output.sequences.tolist(), output.stats, strict=True)
    return [prompts[row // copies] + ids[width : width + stats.num_tokens] for row, (ids, stats) in enumerate(rows)]


def text_of(ids: list[int], tags: TagSet = TAGS) -> str:
    """Spell ids: tags, labels, newlines, and a letter for each text id."""
    spelled = {token: tag for tag, token in tags.ids.items()}
    spelled |= {token: digit for digit, token in DIGITS.items()}
    spelled |= {NEWLINE: "\n", COLON: ":", DOT: ".", PAD: "", EOS: ""}
    return "".join(spelled.get(token) or (chr(ord("a") + token % 26) if token > DOT else "") for token in ids)
