"""Write the untrained base of multiverse-tiny: a fast tokenizer with the tags, and a small Qwen3 with random weights.

python recipes/multiverse-tiny/make_base.py --output runs/multiverse-tiny/base
"""

import random
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from multiverse_hf.data.chains import Kind, document, sample_problem
from multiverse_hf.errors import CommandError, ScriptParser
from multiverse_hf.modeling.modeling_multiverse import MultiverseForCausalLM
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.outputs import check_output, output_folder

# Numbers are cut into pairs of digits from the right, with their sign: "+15", "1|32". One token is then one term of a
# chain, and adding two numbers never has to carry across tokens within a step.
PIECES = r"[+-]?\d{1,2}(?=(?:\d{2})*(?!\d))| ?[A-Za-z]{2,}|[A-Za-z]|\s|[^\sA-Za-z\d]"
MIN_VOCAB_SIZE = 256 + 3 + 12  # bytes, special tokens and tags
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% if not (loop.last and continue_final_message | default(false)) %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on documents of the family and on every number it can need."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    corpus = [f"{number:02d} {number} +{number} -{number}" for number in range(100)] * 20
    for _ in range(300):
        problem = sample_problem(rng, rng.choice(list(Kind)))
        corpus += [problem.prompt(rng.random() < 0.5), document(problem), "system", "user", "assistant"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 15,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    # The tags are tokens of their own; the merges should not be spent on them.
    tags = Regex(r"</?(?:Think|Parallel|Goal|Outline|Path|Conclusion)>")
    plain = pre_tokenizers.Sequence([pre_tokenizers.Split(tags, "removed"), tokenizer.pre_tokenizer])
    final, tokenizer.pre_tokenizer = tokenizer.pre_tokenizer, plain
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.pre_tokenizer = final
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    TagSet.add_to(fast)
    return fast


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--intermediate-size", type=int, default=576)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("hidden_size", "intermediate_size", "layers", "heads", "head_dim"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.head_dim % 2:
        parser.error(f"--head-dim must be even, for rotary positions; got {args.head_dim}")
    if args.vocab_size < MIN_VOCAB_SIZE:
        parser.error(f"--vocab-size must be at least {MIN_VOCAB_SIZE}, got {args.vocab_size}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be at least 0 and below 2**63, got {args.seed}")
    if (args.output / "run.json").exists():
        parser.error(f"--output: {args.output} holds a trained model; choose another folder")
    try:
        check_output(args.output, is_folder=True)
    except CommandError as err:
        parser.error(str(err))

    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.vocab_size)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=args.head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MultiverseForCausalLM.from_config(config, TagSet.from_tokenizer(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with output_folder(args.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"{args.output}: {model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
