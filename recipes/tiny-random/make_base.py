"""Write a tiny base model of any architecture, with random weights and a tokenizer of bytes: to try data and options.

    python recipes/tiny-random/make_base.py --architecture llama --output tiny-llama

It has no tags and no chat template, as a base model of the Hub has none, and it learns nothing worth keeping.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from multiverse_hf.errors import CommandError, ScriptParser, one_line
from multiverse_hf.modeling.loading import base_class
from multiverse_hf.outputs import check_output, output_folder

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32768,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte and one for the end."""
    vocab = {byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", clean_up_tokenization_spaces=False, padding_side="left"
    )


def main() -> None:
    parser = ScriptParser(description=__doc__)
    parser.add_argument(
        "--architecture", default="llama", help="model type, e.g. llama, qwen2, qwen3 (default: llama)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    try:
        check_output(args.output, is_folder=True)
        tokenizer = build_tokenizer()
        config = AutoConfig.for_model(
            args.architecture,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
            **SIZES,
        )
        base_class(config)
    except (CommandError, ValueError) as err:
        parser.error(one_line(err))
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(config)
    with output_folder(args.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(
        f"{args.output}: {args.architecture}, {model.num_parameters() / 1e3:.0f} k parameters, {len(tokenizer)} tokens"
    )


if __name__ == "__main__":
    main()
