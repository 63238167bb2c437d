"""Write ordinary chats in the base's own words, which keep a training from forgetting what the base can do.

    python recipes/smollm2-135m/make_chats.py --base runs/smollm2-135m/base --output recipes/smollm2-135m/chats.jsonl

Each row has a prompt without a suffix, and an answer that the base samples at temperature 0.7. An answer that reaches
the bound ends with its last whole sentence; an answer with a tag is left out. make_data.py --chats adds the file to
both forms of the training rows.
"""

import json
import re
from pathlib import Path

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from multiverse_hf.checkpoints import quiet
from multiverse_hf.errors import CommandError, ScriptParser, one_line
from multiverse_hf.modeling.families import MULTIVERSE
from multiverse_hf.outputs import check_output, write_output

REQUESTS = (
    "Explain {} to somebody who knows nothing about it.",
    "Write a long text about {}, with examples.",
    "Write the reference page of a manual about {}.",
    "Tell me a story in which {} matters.",
)
TOPICS = (
    "the tides", "a bakery", "variables in a programming language", "the human heart", "chess", "the Roman Empire",
    "making tea", "functions that call themselves", "rain forests", "a bicycle", "elections", "error messages",
    "the moon", "sleep", "a library", "files and folders", "bread", "volcanoes", "a train station",
    "classes and objects", "gardening", "money", "the alphabet", "reading a text file line by line", "bees", "glass",
    "winter", "operators and their precedence", "friendship", "the violin", "maps",
    "strings and how they are formatted",
)  # fmt: skip
BATCH = 32


@torch.no_grad()
def answer(base: Path, prompts: list[str], most: int) -> list[str]:
    """Return an answer to each prompt, sampled at temperature 0.7, in whole sentences.

    Raises:
        CommandError: if the base cannot be read.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    except Exception as err:  # a checkpoint is input and may raise anything
        raise CommandError(f"cannot load {base}: {one_line(err, 200)}; give the folder of make_base.py") from err
    answers: list[str] = []
    for at in track(range(0, len(prompts), BATCH), "asking the base"):
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts[at : at + BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(
            **inputs, do_sample=True, temperature=0.7, top_p=0.95, top_k=0, max_new_tokens=most,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        written = output[:, inputs["input_ids"].shape[1] :]
        for row, text in zip(written, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            has_ended = bool((row == tokenizer.eos_token_id).any())
            answers.append(text.strip() if has_ended else cut_sentence(text))
    return answers


def cut_sentence(text: str) -> str:
    """Return a text without the part of a sentence at its end."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"')*]*(?=\s|$)", text)]
    return text[: ends[-1]].strip() if ends else text.strip()


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="bound on an answer (default: 256)")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    prompts = [request.format(topic) for request in REQUESTS for topic in TOPICS]
    try:
        check_output(args.output)
        quiet()
        set_seed(0)
        answers = answer(args.base, prompts, args.max_new_tokens)
        rows = [
            {"family": "chat", "prompt": [{"role": "user", "content": prompt}], "document": text}
            for prompt, text in zip(prompts, answers, strict=True)
            if not any(tag in text for tag in MULTIVERSE.tokens)
        ]
        write_output(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except (CommandError, OSError) as err:
        parser.error(" ".join(str(err).split()))
    print(f"{args.output}: {len(rows)} chats")


if __name__ == "__main__":
    main()
