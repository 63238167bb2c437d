"""Training on a group of completions as one row, in which the prompt stands once, against a row for each.

One model with random weights, one process: forward and backward of log-probabilities and entropies, in turns. Prompts
are random text; completions are documents of random text with blocks, other ones in each row.

- separate: a batch with a row for each completion, as TRL's GRPOTrainer makes it.
- tree: one row, as ``--share_prompt true`` makes it.

Both sides have the same model, attention, prompt, completions and weights of the loss. The ratio is that of each
repeat to the separate rows of the same repeat. Checked on the way: log-probabilities, loss and the norm of the
gradient agree.

Only the first layers of a geometry are made, 4 by default. The share of the prompt in a row decides what is gained, so
there is a measurement for each length of prompt.

    python benchmarks/grpo_tree.py
    python benchmarks/grpo_tree.py --prompts 100 1000 --completion 400 --group 8 --threads 1
    python benchmarks/grpo_tree.py --geometry qwen2.5-7b --device cuda --dtype bfloat16 --prompts 1024 4096
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from geometry import GEOMETRIES, add_model_arguments, count_parameters, make_config, make_model
from memory import peak_of
from report import announce, count, environment, finish, make_parser, show, show_environment, spread
from tqdm import tqdm
from trl.trainer.utils import add_fused_lm_head
from workload import make_document, make_prompts, make_tags

from multiverse_hf.data.rows import IGNORE
from multiverse_hf.evaluation.experiments.timing import in_turns, synchronize
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.training.trees import grow_tree, score_trees

ATTENTION = {"cpu": "multiverse_sdpa", "cuda": "flex_attention"}
LAYERS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of log-probabilities; relative, of loss and gradient


@dataclass
class Side:
    """One way to train on a group.

    Attributes:
        score: returns log-probabilities and entropies, (group, completion).
        num_tokens: that the model reads.
        seconds: of each repeat.
        peak_bytes: of a step, beyond the weights.
        logps, loss, norm: what a step gave; the norm is of the gradient.
    """

    score: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    num_tokens: int
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    logps: torch.Tensor | None = None
    loss: float = 0.0
    norm: float = 0.0


def make_sides(model: Any, tags: TagSet, prompt: list[int], completions: list[list[int]]) -> dict[str, Side]:
    """Return both sides of a group, whose completions have one length."""
    rows = torch.tensor([prompt + completion for completion in completions], device=model.device)
    real, num_scored = torch.ones_like(rows), len(completions[0])

    def separate() -> tuple[torch.Tensor, torch.Tensor]:
        labels = rows.clone()
        labels[:, :-num_scored] = IGNORE
        output = model(input_ids=rows, attention_mask=real, labels=labels, fused_lm_head=True)
        return output.log_probs[:, -num_scored:], output.entropy[:, -num_scored:]

    def tree() -> tuple[torch.Tensor, torch.Tensor]:
        return score_trees(model, tags, rows, real, num_scored)

    num_tokens = len(grow_tree(rows.tolist(), tags).ids)
    return {"separate": Side(separate, rows.numel()), "tree": Side(tree, num_tokens)}


def step(model: Any, side: Side, weights: torch.Tensor) -> None:
    """Do a step of training without the optimizer's."""
    model.zero_grad(set_to_none=True)
    logps, _ = side.score()
    loss = (logps * weights).mean()
    loss.backward()
    side.logps, side.loss = logps.detach(), loss.item()


def time_step(model: Any, side: Side, weights: torch.Tensor) -> None:
    synchronize(model.device)
    begin = time.perf_counter()
    step(model, side, weights)
    synchronize(model.device)
    side.seconds.append(time.perf_counter() - begin)
    side.norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None).item()


def check(sides: dict[str, Side], tolerance: float) -> None:
    """Check that both sides did the same work.

    Raises:
        RuntimeError: if not.
    """
    separate, tree = sides["separate"], sides["tree"]
    worst = (separate.logps - tree.logps).abs().max().item()
    ratios = [tree.loss / separate.loss, tree.norm / separate.norm]
    if not (worst <= tolerance and all(abs(ratio - 1) <= tolerance for ratio in ratios)):
        raise RuntimeError(
            f"not the same work: log-probabilities differ by up to {worst:.2g}; loss {separate.loss:.6g} and "
            f"{tree.loss:.6g}; norm of the gradient {separate.norm:.6g} and {tree.norm:.6g}"
        )


def summarize(length: int, sides: dict[str, Side]) -> dict[str, Any]:
    """Return time, memory and tokens of both sides, and the tree's to those of separate rows."""
    separate, tree = sides["separate"], sides["tree"]
    return {
        "prompt": length,
        "sides": {
            name: {"tokens": side.num_tokens, "seconds": spread(side.seconds), "peak_bytes": side.peak_bytes}
            for name, side in sides.items()
        },
        "tokens_ratio": round(separate.num_tokens / tree.num_tokens, 4),
        "speed_ratio": spread([a / b for a, b in zip(separate.seconds, tree.seconds, strict=True)]),
        "memory_ratio": round(separate.peak_bytes / tree.peak_bytes, 4),
    }


def print_results(results: list[dict[str, Any]]) -> None:
    """Print the sides, for people."""
    print(f"\n{'prompt':>7}  {'side':9}{'tokens':>8}   {'s [least, greatest]':28}{'peak':>10}")
    for row in results:
        for name, side in row["sides"].items():
            print(
                f"{row['prompt']:7}  {name:9}{side['tokens']:8}   {show(side['seconds']):28}"
                f"{side['peak_bytes'] / 2**20:6.0f} MiB"
            )
        print(
            f"{row['prompt']:7}  separate rows to the tree: {row['tokens_ratio']:.2f} times the tokens, "
            f"{show(row['speed_ratio'])} times the time, {row['memory_ratio']:.2f} times the memory"
        )


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    add_model_arguments(parser)
    parser.add_argument(
        "--prompts", type=count, nargs="+", default=[128, 512, 1536], help="tokens of a prompt (default: 128 512 1536)"
    )
    parser.add_argument("--completion", type=count, default=512, help="tokens of a completion (default: %(default)s)")
    parser.add_argument("--group", type=count, default=8, help="completions of a prompt (default: %(default)s)")
    parser.add_argument(
        "--path-tokens", type=count, nargs=2, default=[40, 120], help="fewest and most of a path (default: 40 120)"
    )
    parser.add_argument("--attn", help="implementation (default: multiverse_sdpa on a CPU, flex_attention on a GPU)")
    parser.add_argument("--layers", type=count, help=f"layers of the model (default: {LAYERS}, if it has so many)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    num_layers = args.layers or min(LAYERS, GEOMETRIES[args.geometry]["num_hidden_layers"])
    vocab_size, dtype = make_config(args.geometry, num_layers).vocab_size, getattr(torch, args.dtype)
    tags = make_tags(newlines=False)
    try:
        completions = [
            make_document(tags, args.completion, vocab_size, tuple(args.path_tokens), args.seed + number)
            for number in range(args.group)
        ]
    except ValueError as err:
        parser.error(str(err))
    result = {"benchmark": "grpo_tree", **environment(args.device)}
    show_environment(result)
    model = make_model(args.geometry, args.device, tags, args.seed, dtype, num_layers).train()
    model.set_attn_implementation(attention := args.attn or ATTENTION[args.device.type])
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    weights = torch.randn(args.group, args.completion, generator=torch.Generator().manual_seed(args.seed))
    weights = weights.to(args.device)
    result |= {"geometry": args.geometry, "layers": num_layers, "dtype": args.dtype, "attention": attention}
    result |= {"group": args.group, "completion": args.completion, "repeats": args.repeats, "results": []}
    result["parameters"] = count_parameters(args.geometry, tags, num_layers)
    lengths = sorted(set(args.prompts))
    short = make_sides(model, tags, *make_prompts(1, lengths[0], vocab_size).tolist(), completions)["separate"]
    for _ in range(2):  # the first warms up
        time_step(model, short, weights)
    num_tokens = 2 * args.group * sum(length + args.completion for length in lengths)
    announce((1 + args.repeats) * num_tokens / short.num_tokens * short.seconds[-1])
    with tqdm(total=2 * len(lengths) * (1 + args.repeats), unit="step", file=sys.stderr) as bar:
        for length in lengths:
            (prompt,) = make_prompts(1, length, vocab_size).tolist()
            sides = make_sides(model, tags, prompt, completions)
            for side in sides.values():  # warms up, and compiles
                if args.device.type == "cuda":
                    step(model, side, weights)
                model.zero_grad(set_to_none=True)
                side.peak_bytes = peak_of(lambda side=side: step(model, side, weights), args.device)
                bar.update()
            for side in in_turns(list(sides.values()), args.repeats):
                time_step(model, side, weights)
                bar.update()
            check(sides, TOLERANCE[dtype])
            result["results"].append(summarize(length, sides))
    print_results(result["results"])
    finish(result, args.output)


if __name__ == "__main__":
    main()
