"""Compare a trained model with its base on text and questions that neither was trained on here.

    python recipes/smollm2-135m/forgetting.py --base runs/smollm2-135m/base --model runs/smollm2-135m/multiverse \
        --output runs/smollm2-135m/forgetting

OUTPUT.json has the loss of both on the reference of Python's own documentation (the standard library's pydoc_data).
OUTPUT.md has it too, and the answers of both to 20 plain questions, greedy and whole.
"""

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from multiverse_hf.checkpoints import quiet
from multiverse_hf.errors import CommandError, ScriptParser, one_line
from multiverse_hf.outputs import check_output, write_output
from multiverse_hf.provenance import commit, hardware, versions

WINDOW = 1024  # tokens of a pass
QUESTIONS = (
    "What is the capital of France?",
    "Who wrote Romeo and Juliet?",
    "Why is the sky blue?",
    "Name three fruits that are red.",
    "What is the largest planet of the solar system?",
    "Translate into French: Good morning, my friend.",
    "Write a sentence with the word river.",
    "How many days are in a leap year?",
    "What do bees make?",
    "Give one tip for a good night's sleep.",
    "What is photosynthesis?",
    "Which ocean is between Africa and America?",
    "Write a polite email that asks for a day off.",
    "What is the opposite of cold?",
    "Who was Albert Einstein?",
    "How do I boil an egg?",
    "What is a noun?",
    "Tell me a short story about a cat.",
    "What is the chemical formula of water?",
    "Name two animals that can fly.",
)


def load(path: Path) -> tuple[Any, Any]:
    """Return model and tokenizer.

    Raises:
        CommandError: if they cannot be read.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(path)
    except Exception as err:  # a checkpoint is input and may raise anything
        raise CommandError(f"cannot load {path}: {one_line(err, 200)}; give the folder of a checkpoint") from err


@torch.no_grad()
def measure_loss(model: Any, tokenizer: Any, windows: int) -> float:
    """Return the mean loss in nats over the first ``windows`` windows of the text."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    parts = [ids[at * WINDOW : (at + 1) * WINDOW][None] for at in range(windows)]
    losses = [model(part, labels=part).loss.item() for part in track(parts, "reading")]
    return sum(losses) / len(losses)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str, most: int) -> str:
    """Return the greedy answer to a question."""
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, do_sample=False, max_new_tokens=most, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Return losses and answers of both."""
    quiet()
    result: dict[str, Any] = {"loss": {}, "answers": {question: {} for question in QUESTIONS}}
    for name, path in (("base", args.base), ("trained", args.model)):
        model, tokenizer = load(path)
        result["loss"][name] = measure_loss(model, tokenizer, args.windows)
        for question in track(QUESTIONS, f"asking {name}"):
            result["answers"][question][name] = answer(model, tokenizer, question, args.max_new_tokens)
    result["change_percent"] = 100 * (result["loss"]["trained"] / result["loss"]["base"] - 1)
    return result | {"windows": args.windows, "window": WINDOW, "versions": versions(), "hardware": hardware()}


def page(result: dict[str, Any]) -> str:
    """Return the result for people."""
    loss, change = result["loss"], result["change_percent"]
    lines = [f"Loss on {result['windows'] * WINDOW:,} tokens: base {loss['base']:.4f}, trained {loss['trained']:.4f} "]
    lines[0] += f"({change:+.1f} %)."
    for question, answers in result["answers"].items():
        lines += ["", f"### {question}"]
        for name, text in answers.items():
            lines += ["", f"{name}:", "", *(f"> {line}".rstrip() for line in text.splitlines() or [""])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without an ending")
    parser.add_argument("--windows", type=int, default=16, help=f"windows of {WINDOW} tokens (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="bound on an answer (default: 96)")
    args = parser.parse_args()
    for name in ("windows", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    try:
        check_output(args.output.with_suffix(".json"))
        result = run(args) | {"commit": commit()}
        write_output(args.output.with_suffix(".json"), json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        write_output(args.output.with_suffix(".md"), page(result))
    except CommandError as err:
        parser.error(str(err))
    loss = result["loss"]
    print(f"loss {loss['base']:.4f} -> {loss['trained']:.4f} ({result['change_percent']:+.1f} %); {args.output}.md")


if __name__ == "__main__":
    main()
