"""Let the embedded model write an answer, and note in which step and branch each token was written."""

from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt
from multiverse_hf.data.suffixes import PARALLEL_SUFFIX
from multiverse_hf.viewing.results import ENGINE_COUNTS, ViewedResult
from multiverse_hf.viewing.trace import TraceBuilder

QUESTION = "A=19-7+12; B=8+15-3; C=5+6; total?"
PROMPT = f"{QUESTION} {PARALLEL_SUFFIX}"


class Recorder:
    """A streamer that notes, for every token, its branch and the step that wrote it."""

    def __init__(self) -> None:
        self.step = -1  # the pass over the prompt is step 0
        self.tokens: list[tuple[str, int, bool, int]] = []  # branch, step, sampled, token id
        self.fork = self.reduce = 0  # steps

    def count(self, *_: object) -> None:
        self.step += 1

    def on_event(self, event: Any) -> None:
        if event.kind == "token":
            self.tokens.append((event.branch, self.step, event.sampled, event.token))
        elif event.kind in ("fork", "reduce"):
            setattr(self, event.kind, self.step)


@dataclass(frozen=True)
class Recording:
    """An answer of the embedded model.

    Attributes:
        tokens: branch, step, sampled and token id of each token, in the order of the engine's events.
        fork: step of the fork.
        reduce: step of the reduce.
        stats: the engine's own counts.
        trace: what ``multiverse view`` shows of the answer: its texts, branches and tree.
        tokenizer: the model's tokenizer.
    """

    tokens: list[tuple[str, int, bool, int]]
    fork: int
    reduce: int
    stats: Any
    trace: dict[str, Any]
    tokenizer: Any

    @property
    def answer(self) -> str:
        """Return the number at the end of the answer."""
        return "".join(self.trace["tokens"]["text"]).split()[-1]

    def steps(self) -> list[int]:
        """Return the step of each token of the document, from the engine's events."""
        written = {branch["name"]: [] for branch in self.trace["branches"]}
        for name, step, *_ in self.tokens:
            written[name].append(step)
        found = []
        for segment in self.trace["segments"]:
            name = self.trace["branches"][segment["branch"]]["name"]
            found += [written[name].pop(0) for _ in range(segment["start"], segment["stop"])]
        return found


def record() -> Recording:
    """Return the embedded model's answer to the question, with its engine's events.

    Raises:
        RuntimeError: if the events and the engine's counts differ.
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    model = MultiverseForCausalLM.from_pretrained(embedded_model())
    recorder = Recorder()
    model.base_model.register_forward_hook(recorder.count)
    ids = encode_prompt(tokenizer, PROMPT, return_tensors="pt")
    out = model.generate(ids, max_new_tokens=1024, streamer=recorder, return_dict_in_generate=True)
    stats, total = out.stats[0], len(recorder.tokens)
    if (stats.num_tokens, stats.num_steps) != (total, recorder.step):
        raise RuntimeError(f"{total} tokens in {recorder.step} steps were seen, but stats say {stats}")
    written = out.sequences[0, ids.shape[1] :].tolist()
    document = tokenizer.decode([token for token in written if token != tokenizer.eos_token_id])
    facts = {"model": "multiverse-tiny", "answer": document.split()[-1]}
    counts = {name: getattr(stats, name) for name in ENGINE_COUNTS}
    result = ViewedResult("answer.json", "answer.json", document, PROMPT, facts=facts, counts=counts)
    trace = TraceBuilder(tokenizer, model.tags, "multiverse-tiny").build(result)
    return Recording(recorder.tokens, recorder.fork, recorder.reduce, stats, trace, tokenizer)
