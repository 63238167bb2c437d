"""Training tokens per second of rows with paths, against plain causal rows of the very same tokens.

One model with random weights, one process: forward and backward of the loss, in turns. Rows are documents of random
text with blocks of two to four paths, one row a batch, laid out by ``DocumentCollator``:

- causal: the row marked as plain, with transformers' sdpa and no mask; on a GPU torch's flash kernel and no other.
- one side for each of --attn: the same ids and labels with their layout.

What is compared is what the layout costs: parameters, ids and labels are the same, so all but attention does the same
work. The share of attention grows with the length, and falls with the width of the model and the size of the
vocabulary. The ratio is that of each repeat to the causal row of the same repeat, by the clock and by the time that
the process computed, which is closer to the truth on a CPU with other work. Checked on the way: ids and labels are
equal, and all sides with paths give one loss.

Only the first layers of a geometry are made, 4 by default: each is what it is in the whole model, but the output layer
weighs more. On a GPU the loss is computed from 2,048 tokens' logits at a time, as trainers do. With --threads 1 other
work on the machine disturbs a CPU least.

    python benchmarks/train_throughput.py
    python benchmarks/train_throughput.py --attn multiverse_sdpa --lengths 1024 2048 4096 --dtype bfloat16 --layers 2
    python benchmarks/train_throughput.py --threads 1 --output benchmarks/results/train_throughput_cpu.json
    python benchmarks/train_throughput.py --geometry qwen2.5-7b --device cuda --lengths 16384 32768
"""

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from geometry import GEOMETRIES, add_model_arguments, count_parameters, make_config, make_model
from memory import peak_of
from report import announce, count, environment, finish, make_parser, show, show_environment, spread
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from workload import EOS, make_document, make_tags

from multiverse_hf.data.collation import DocumentCollator
from multiverse_hf.data.rows import IGNORE, document_labels
from multiverse_hf.evaluation.experiments.timing import in_turns, synchronize
from multiverse_hf.modeling.tags import TagSet

LENGTHS = {"cpu": [2048], "cuda": [16_384, 32_768]}
ATTENTION = {"cpu": ["multiverse_sdpa", "sdpa"], "cuda": ["flex_attention"]}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}  # flash attention takes no float32
LAYERS = 4
SHORT = 256  # tokens of the row that says beforehand how long it takes
LOSS_CHUNK = 2048  # tokens, on a GPU: logits of 32k tokens over 152k words would take 20 GiB in float32
MULTIPLE = 128  # tokens that rows are padded to, as for compiled kernels
TARGET = 0.95
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of losses, relative

Batch = dict[str, torch.Tensor]


@dataclass
class Side:
    """One way to train on a row.

    Attributes:
        name: ``causal``, or how paths are masked.
        attention: implementation of attention.
        batch: what the model is given.
        seconds: of each repeat.
        cpu_seconds: that the process computed in each repeat, which other work on the machine adds little to.
        loss: of the row.
        peak_bytes: of a step, beyond the weights.
    """

    name: str
    attention: str
    batch: Batch
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    peak_bytes: int = 0


def make_sides(ids: list[int], tags: TagSet, attention: list[str], device: torch.device) -> list[Side]:
    """Collate a row in both forms, and check that ids and labels are the same.

    Raises:
        RuntimeError: if they are not, or if the wrong one has a layout.
    """
    row = {"input_ids": ids, "labels": document_labels(ids, tags)}
    collator = DocumentCollator(tags, EOS, multiple=MULTIPLE)
    causal, paths = (
        {name: t.to(device) for name, t in collator([each]).items()} for each in (row | {"plain": True}, row)
    )
    same = all(torch.equal(causal[name], paths[name]) for name in row)
    num_segments = [side["visible"].shape[-1] if "visible" in side else 1 for side in (causal, paths)]
    if not same or num_segments[0] != 1 or num_segments[1] == 1:
        raise RuntimeError("both forms of a row must have the same ids and labels, and only one of them a layout")
    return [Side("causal", "sdpa", causal), *(Side(name, name, paths) for name in attention)]


def loss_of(model: Any, batch: Batch, chunk: int | None) -> torch.Tensor:
    """Compute the loss as the model does, or with the logits of ``chunk`` tokens at a time."""
    if chunk is None:
        return model(**batch, use_cache=False).loss
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels = batch["labels"][:, 1:].flatten()
    head = model.get_output_embeddings()

    def part(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORE, reduction="sum")

    pieces = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    total = sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces)
    return total / (labels != IGNORE).sum()


def make_step(model: Any, side: Side, chunk: int | None) -> Callable[[], float]:
    """Return a step of training without the optimizer's: it returns the loss."""
    is_flash = side.name == "causal" and model.device.type == "cuda"

    def step() -> float:
        model.set_attn_implementation(side.attention)
        model.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if is_flash else contextlib.nullcontext():
            loss = loss_of(model, side.batch, chunk)
            loss.backward()
        return loss.item()

    return step


def run(model: Any, side: Side, chunk: int | None) -> None:
    """Time one step."""
    step = make_step(model, side, chunk)
    synchronize(model.device)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    side.loss = step()
    synchronize(model.device)
    side.seconds.append(time.perf_counter() - begin)
    side.cpu_seconds.append(time.process_time() - cpu_begin)


def check(sides: list[Side], dtype: torch.dtype) -> None:
    """Check that all sides with paths computed one loss, and the causal one another.

    Raises:
        RuntimeError: if not.
    """
    causal, first, *others = sides
    for side in others:
        if not abs(side.loss - first.loss) <= TOLERANCE[dtype] * abs(first.loss):
            raise RuntimeError(
                f"{side.name} gives a loss of {side.loss}, {first.name} of {first.loss}: not the same work"
            )
    if not (causal.loss > 0 and first.loss > 0):
        raise RuntimeError(f"losses of {causal.loss} and {first.loss} are none of a model that trains")


def summarize(length: int, sides: list[Side]) -> dict[str, Any]:
    """Return speed and memory of each side, and what it is to the causal row."""
    causal = sides[0]
    result: dict[str, Any] = {"tokens": length, "sides": {}}
    for side in sides:
        ratios = [theirs / ours for theirs, ours in zip(causal.seconds, side.seconds, strict=True)]
        cpu_ratios = [theirs / ours for theirs, ours in zip(causal.cpu_seconds, side.cpu_seconds, strict=True)]
        result["sides"][side.name] = {
            "seconds": spread(side.seconds),
            "cpu_seconds": spread(side.cpu_seconds),
            "tokens_per_s": spread([length / seconds for seconds in side.seconds]),
            "peak_bytes": side.peak_bytes,
            "loss": round(side.loss, 6),
        }
        if side is not causal:
            result["sides"][side.name]["speed_to_causal"] = spread(ratios)
            result["sides"][side.name]["cpu_speed_to_causal"] = spread(cpu_ratios)
            result["sides"][side.name]["peak_to_causal"] = round(side.peak_bytes / causal.peak_bytes, 4)
    return result


def print_results(results: list[dict[str, Any]]) -> None:
    """Print the sides, for people."""
    columns = f"{'tokens/s [least, greatest]':30}{'times causal':24}{'by CPU time':24}{'peak':>10}{'times':>8}"
    print(f"\n{'tokens':>7}  {'side':17}{columns}")
    for row in results:
        for name, side in row["sides"].items():
            speed = show(side["speed_to_causal"]) if "speed_to_causal" in side else ""
            cpu = show(side["cpu_speed_to_causal"]) if "cpu_speed_to_causal" in side else ""
            peak = f"{side['peak_to_causal']:.3f}" if "peak_to_causal" in side else ""
            print(
                f"{row['tokens']:7}  {name:17}{show(side['tokens_per_s']):30}{speed:24}{cpu:24}"
                f"{side['peak_bytes'] / 2**20:6.0f} MiB{peak:>8}"
            )
    for row in results:
        for name, side in row["sides"].items():
            if "speed_to_causal" in side:
                holds = side["speed_to_causal"]["median"] >= TARGET
                print(f"{row['tokens']} tokens, {name}: {TARGET} or more {'holds' if holds else 'DOES NOT HOLD'}")


def main() -> None:
    parser = make_parser(__doc__, repeats=3)
    add_model_arguments(parser)
    parser.add_argument(
        "--lengths", type=count, nargs="+", help="tokens of a row (default: 2048 on a CPU, 16384 32768 on a GPU)"
    )
    parser.add_argument(
        "--attn",
        choices=["multiverse_sdpa", "sdpa", "flex_attention"],
        nargs="+",
        help="how paths are masked (default: multiverse_sdpa sdpa on a CPU, flex_attention on a GPU)",
    )
    parser.add_argument("--layers", type=count, help=f"layers of the model (default: {LAYERS}, if it has so many)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES.values()), help="of weights (default: float32 on a CPU, bfloat16 on a GPU)"
    )
    parser.add_argument(
        "--loss-chunk", type=count, help="tokens whose logits exist at once (default: all on a CPU, 2048 on a GPU)"
    )
    args = parser.parse_args()
    device = args.device
    dtype_name = args.dtype or DTYPES[device.type]
    dtype = getattr(torch, dtype_name)
    lengths = sorted(set(args.lengths or LENGTHS[device.type]))
    attention = list(dict.fromkeys(args.attn or ATTENTION[device.type]))
    chunk = args.loss_chunk or (LOSS_CHUNK if device.type == "cuda" else None)
    if "flex_attention" in attention and device.type == "cpu":
        parser.error("--attn flex_attention trains on a GPU only (torch has no backward for it on a CPU); take sdpa")
    if dtype is torch.float32 and device.type == "cuda":
        parser.error("--dtype float32: flash attention, which paths are compared with on a GPU, takes bfloat16 only")
    there = GEOMETRIES[args.geometry]["num_hidden_layers"]
    if (num_layers := args.layers or min(LAYERS, there)) > there:
        parser.error(f"--layers {num_layers}: {args.geometry} has {there}; take so many or fewer")
    config = make_config(args.geometry, num_layers)
    if lengths[-1] > config.max_position_embeddings:
        parser.error(f"--lengths {lengths[-1]}: {args.geometry} has {config.max_position_embeddings} positions")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tags = make_tags(newlines=False)
    try:
        documents = [make_document(tags, length, config.vocab_size, seed=args.seed) for length in lengths]
    except ValueError as err:
        parser.error(str(err))
    num_parameters = count_parameters(args.geometry, tags, num_layers)
    result = {"benchmark": "train_throughput", **environment(device)}
    show_environment(result)
    print(
        f"random {args.geometry}, {num_layers} layers, {num_parameters / 1e9:.2f} B parameters, {dtype_name}, one row"
    )
    model = make_model(args.geometry, device, tags, args.seed, dtype, num_layers).train()
    result |= {"geometry": args.geometry, "layers": num_layers, "parameters": num_parameters, "dtype": dtype_name}
    result |= {"repeats": args.repeats, "loss_chunk": chunk, "results": []}
    short = make_sides(make_document(tags, SHORT, config.vocab_size, (20, 60)), tags, [], device)[0]
    for _ in range(2):  # the first warms up
        run(model, short, chunk)
    steps = (1 + args.repeats + (device.type == "cuda")) * (1 + len(attention))
    announce(steps * sum(lengths) / SHORT * short.seconds[-1])
    with tqdm(total=len(lengths) * (1 + len(attention)) * (1 + args.repeats), unit="step", file=sys.stderr) as bar:
        for length, ids in zip(lengths, documents, strict=True):
            sides = make_sides(ids, tags, attention, device)
            for side in sides:  # warms up, and compiles
                bar.set_description(f"{length} tokens, memory of {side.name}", refresh=False)
                if device.type == "cuda":
                    make_step(model, side, chunk)()
                model.zero_grad(set_to_none=True)
                side.peak_bytes = peak_of(make_step(model, side, chunk), device)
                bar.update()
            for side in in_turns(sides, args.repeats):
                bar.set_description(f"{length} tokens, {side.name}", refresh=False)
                run(model, side, chunk)
                bar.update()
            check(sides, dtype)
            result["results"].append(summarize(length, sides))
    print_results(result["results"])
    finish(result, args.output)


if __name__ == "__main__":
    main()
