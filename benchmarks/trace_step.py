"""Which functions of the engine a decoding step passes, by file: what a reader has to follow.

A tiny model with random weights writes two paths. One step in the middle of them is traced. Comprehensions and lambdas
belong to the function they stand in.

    python benchmarks/trace_step.py
"""

import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from geometry import make_model
from workload import make_goal, make_prompts, make_tags, plan_block

import multiverse_hf
from multiverse_hf.errors import ScriptParser
from multiverse_hf.modeling.cache import LogCache
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.generation import read_requests

ROOT = Path(multiverse_hf.__file__).parent
BEFORE = 12  # steps


def trace_step() -> dict[str, dict[str, int]]:
    """Return for each file the functions of it that a step calls, in order, and how often."""
    tags = make_tags(newlines=False)
    model = make_model("tiny", torch.device("cpu"), tags, 0)
    answer = plan_block(tags, 2, 64)
    prompt = make_prompts(1, 64, model.config.vocab_size, make_goal(tags, 2)[:-1])
    asked = read_requests(model, prompt, None, None, None, 0, answer.options)
    engine = Engine(model, tags, LogCache(model.config.num_hidden_layers, 4096))
    sequence = engine.add(asked.requests[0])
    for _ in range(BEFORE):
        engine.step()
    if not len(sequence.pending) == len(sequence.live) == 2:
        raise RuntimeError("the step to trace has to be one in which two paths write a token each")
    calls: Counter[tuple[str, str]] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        path = Path(code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and not code.co_name.startswith("<"):
            calls[str(path.relative_to(ROOT)), code.co_qualname] += 1

    sys.setprofile(note)
    try:
        engine.step()
    finally:
        sys.setprofile(None)
    files: dict[str, dict[str, int]] = defaultdict(dict)
    for (file, function), count in calls.items():
        files[file][function] = count
    return dict(files)


def main() -> None:
    description, _, examples = __doc__.partition("\n\n    python")
    ScriptParser(description=description, epilog="example:\n    python" + examples).parse_args()
    files = trace_step()
    for file, functions in files.items():
        print(f"{file}: {len(functions)}")
        for function, count in functions.items():
            print(f"    {function.replace('.<locals>', '')}{f'  x {count}' if count > 1 else ''}")
    print(f"{sum(map(len, files.values()))} functions in {len(files)} files")


if __name__ == "__main__":
    main()
