"""What copies of long branches gain on a CPU: whole answers with them and without, step beside step.

A model with random weights writes one block of p paths of n tokens, greedily. Two engines take their steps in turns,
in one process and on the same weights. One copies what long branches see (``modeling/attention_copies.py``), the other
masks the log. Both have to write the same number of tokens in the same structure. The ratio is that of the sums of all
steps after the prompt; above 1 the copies are faster.

    python benchmarks/branch_copies.py
    python benchmarks/branch_copies.py --paths 16 --path-tokens 2048 --dtype float32 --layers 2 --repeats 1
    python benchmarks/branch_copies.py --paths 8 16 --path-tokens 512 2048 4096 --repeats 5
"""

import argparse
import itertools
from typing import Any

import torch
from geometry import GEOMETRIES, make_config, make_model
from report import (
    announce,
    count,
    environment,
    finish,
    make_parser,
    seconds_of_passes,
    show,
    show_environment,
    spread,
    store,
)
from tqdm import tqdm
from workload import make_goal, make_prompts, make_tags, plan_block, steps_in_turns

from multiverse_hf.modeling.cache import LogCache
from multiverse_hf.modeling.engine import Engine
from multiverse_hf.modeling.generation import read_requests
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.modeling.threads import set_threads

CPU = torch.device("cpu")
SPARE = 1024  # log entries of the pool beyond an answer


def measure(model: Any, tags: TagSet, num_paths: int, path_tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Write the block ``--repeats`` times with both engines.

    Raises:
        RuntimeError: if an answer did not come out as asked.
    """
    prompt = make_prompts(1, args.prompt, model.config.vocab_size, make_goal(tags, num_paths)[:-1])
    answer, seconds = plan_block(tags, num_paths, path_tokens), []
    for repeat in range(args.repeats):
        engines, sequences = [], []
        for has_copies in (True, False):
            asked = read_requests(model, prompt, None, None, None, 0, answer.options)
            cache = LogCache(model.config.num_hidden_layers, args.prompt + answer.num_tokens + SPARE)
            engines.append(Engine(model, tags, cache))
            if not has_copies:
                engines[-1].runner.copies = None
            sequences.append(engines[-1].add(asked.requests[0]))
        sums, most = [0.0, 0.0], 0
        bar = tqdm(total=path_tokens, desc=f"{num_paths} x {path_tokens}, repeat {repeat + 1} of {args.repeats}")
        for pair in steps_in_turns(engines, CPU):
            sums = [total + each for total, each in zip(sums, pair, strict=True)]
            most = max(most, engines[0].cache.copies.num_entries)
            bar.update()
            bar.set_postfix(ratio=f"{sums[1] / sums[0]:.2f}", refresh=False)
        bar.close()
        for sequence, engine in zip(sequences, engines, strict=True):
            answer.check(sequence.stats)
            engine.runner.free()
        seconds.append(sums)
    return {
        "paths": num_paths,
        "path_tokens": path_tokens,
        "most_copied_tokens": most,
        "copies_s": spread([with_copies for with_copies, _ in seconds]),
        "masks_s": spread([masks for _, masks in seconds]),
        "ratio": spread([masks / with_copies for with_copies, masks in seconds]),
    }


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="cpu-0.24b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=count, default=2, help="layers to keep (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="(default: %(default)s)")
    parser.add_argument("--paths", type=count, nargs="+", default=[8, 16], help="paths of the block (default: 8 16)")
    parser.add_argument("--path-tokens", type=count, nargs="+", default=[512], help="tokens a path (default: 512)")
    parser.add_argument("--prompt", type=count, default=256, help="tokens of the prompt (default: %(default)s)")
    args = parser.parse_args()
    if min(args.paths) < 2:
        parser.error(f"--paths needs 2 or more, got {min(args.paths)}: a lone branch sees all of its log")
    length = make_config(args.geometry).max_position_embeddings
    if args.prompt + max(args.path_tokens) + SPARE > length:
        parser.error(f"--prompt and --path-tokens take more than the {length} positions of {args.geometry}")
    if args.threads is not None:
        set_threads(args.threads)

    tags = make_tags(newlines=False)
    model = make_model(args.geometry, CPU, tags, args.seed, getattr(torch, args.dtype), args.layers)
    result = {"benchmark": "branch_copies", **environment(), "geometry": args.geometry, "layers": args.layers}
    result |= {"dtype": args.dtype, "prompt_tokens": args.prompt, "repeats": args.repeats, "results": []}
    show_environment(result)
    work = list(itertools.product(args.path_tokens, args.paths))
    passes = [(2 * args.repeats * tokens, 2 * args.repeats * tokens * num_paths) for tokens, num_paths in work]
    announce(seconds_of_passes(model, passes))
    for path_tokens, num_paths in work:
        row = measure(model, tags, num_paths, path_tokens, args)
        result["results"].append(row)
        store(result, args.output)
        print(
            f"{num_paths:3} paths of {path_tokens} tokens: {show(row['masks_s'], ' s')} with masks, "
            f"{show(row['copies_s'], ' s')} with copies; {show(row['ratio'])} times as fast with copies"
        )
    finish(result, args.output)


if __name__ == "__main__":
    main()
