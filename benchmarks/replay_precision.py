"""Replay equality in low precision: how far logits are from the exact ones, and whether the engine adds to it.

A model with random weights writes a document with one block of paths on the engine. The logits that each token was
chosen from are compared with the exact ones, from one pass of the same weights over the document in float64.
Rounding alone makes a distance; so the plain model's own is measured beside it, in one pass over a text of as many
tokens without a block, with transformers' sdpa. A ratio near 1 says that branches, the engine's way to attend and its
graphs lose nothing that the dtype does not lose anyway.

Distances are |a - b| / |b|, in the Euclidean norm, over all logits that tokens were chosen from. Measured are

- engine: the logits it chose from, for each way of decoding that runs on the device.
- document: one pass over the document, for each way to attend.
- backward: the gradient of the loss of the document's chosen tokens with respect to the embeddings, likewise.

    python benchmarks/replay_precision.py
    python benchmarks/replay_precision.py --paths 4 --path-tokens 1024 --dtype float32 --layers 4
    python benchmarks/replay_precision.py --geometry qwen2.5-0.5b --device cuda --path-tokens 1024
"""

import argparse
import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from geometry import Load, add_model_arguments, make_config, make_model, plan_cache
from report import announce, count, environment, finish, make_parser, seconds_of_passes, show_environment, shown
from workload import Answer, make_goal, make_prompts, make_tags, plan_block

from multiverse_hf.modeling.multiverse_engine import MultiverseEngine
from multiverse_hf.modeling.tags import TagSet
from multiverse_hf.modeling.threads import set_threads

DECODING = {"cpu": ["packed", "simple"], "cuda": ["static", "packed", "simple"]}
ATTENTION = {"cpu": ["sdpa", "eager", "multiverse_sdpa"], "cuda": ["sdpa", "eager", "flex_attention"]}
PATH_TOKENS = {"cpu": 64, "cuda": 512}  # a pass in float64 takes minutes on a CPU
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def distance(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Return |value - exact| / |exact|."""
    return float((value.double() - exact).norm() / exact.norm())


@contextlib.contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Have a model attend in a given way."""
    own = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def logits_of(model: Any, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the logits that the tokens at ``rows`` are chosen from, (rows, V): those of the tokens before them."""
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=rows - 1).logits[0]


def gradient_of(model: Any, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the mean loss of some tokens with respect to the embeddings of all, (L, hidden)."""
    embeddings = model.get_input_embeddings()
    kept: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    hook = embeddings.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = logits_of(model, ids, rows)
            loss = torch.nn.functional.cross_entropy(
                logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[0, rows]
            )
            (gradient,) = torch.autograd.grad(loss, kept[0])
    finally:
        hook.remove()
    return gradient[0]


def write(model: Any, tags: TagSet, decoding: str, cache_tokens: int, args: argparse.Namespace) -> Any:
    """Have the engine write the document; check that it came out as asked."""
    answer = plan_block(tags, args.paths, args.path_tokens)
    prompt = make_prompts(1, args.prompt, model.config.vocab_size, make_goal(tags, args.paths)[:-1])
    with MultiverseEngine(model, max_cache_tokens=cache_tokens, decoding=decoding) as engine:
        (result,) = engine.generate(list(prompt), output_logits=True, return_dict_in_generate=True, **answer.options)
        if engine._engine.runner.name != decoding:
            raise RuntimeError(f"{decoding} decoding does not run here, {engine._engine.runner.name} did")
    answer.check(result.stats)
    return result


def measure(model: Any, tags: TagSet, answer: Answer, cache_tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure all distances of an answer."""
    device = args.device
    exact = copy.deepcopy(model).double()
    length, decoding, attention = args.prompt + answer.num_tokens, DECODING[device.type], ATTENTION[device.type]
    # a gradient takes as long as two more passes
    own, as_float64 = 1 + 3 + 4 * len(attention), 2 + 6 + len(decoding)
    writing = [(answer.length, length)] * (1 + len(decoding))
    announce(
        seconds_of_passes(model, [*writing, (own, own * length)])
        + seconds_of_passes(exact, [(as_float64, as_float64 * length)])
    )
    found: dict[str, Any] = {"engine": {}, "document": {}, "backward": {}, "errors": {}}
    result = write(model, tags, "simple", cache_tokens, args)
    ids, rows = document_of(result, device)
    text = make_prompts(1, ids.shape[1], model.config.vocab_size).to(device)
    with torch.no_grad():
        of_document, of_text = logits_of(exact, ids, rows), logits_of(exact, text, rows)
        found["plain"] = distance(logits_of(model, text, rows), of_text)
    found["plain_backward"] = distance(gradient_of(model, text, rows), gradient_of(exact, text, rows))
    exact_gradient = gradient_of(exact, ids, rows)

    def engine(name: str) -> float:
        result = write(model, tags, name, cache_tokens, args)
        ids, rows = document_of(result, device)
        chosen_from = torch.stack([each for each in result.logits if each is not None]).to(device)
        with torch.no_grad():
            return distance(chosen_from, logits_of(exact, ids, rows))

    def document(name: str) -> float:
        with attending(model, name), torch.no_grad():
            return distance(logits_of(model, ids, rows), of_document)

    def backward(name: str) -> float:
        with attending(model, name):
            return distance(gradient_of(model, ids, rows), exact_gradient)

    ways = [("engine", engine, name) for name in decoding]
    ways += [(call.__name__, call, name) for name in attention for call in (document, backward)]
    for kind, call, name in shown(ways, "way"):
        try:
            found[kind][name] = call(name)
        except Exception as err:  # what does not run here is no reason to lose the rest
            found["errors"][f"{kind} {name}"] = f"{type(err).__name__}: {err}"[:500]
    return found | {"tokens": ids.shape[1], "chosen_tokens": len(rows)}


def document_of(result: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of prompt and answer, (1, L), and the places of the tokens that the model chose."""
    ids = torch.tensor([result.prompt_ids + result.ids], device=device)
    chosen = [number for number, sampled in enumerate(result.sampled, len(result.prompt_ids)) if sampled]
    return ids, torch.tensor(chosen, device=device)


def main() -> None:
    parser = make_parser(__doc__, repeats=1)
    add_model_arguments(parser)
    parser.add_argument("--paths", type=count, default=8, help="paths of the block (default: %(default)s)")
    parser.add_argument("--path-tokens", type=count, help="tokens a path (default: 64, on a GPU 512)")
    parser.add_argument("--prompt", type=count, default=256, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--layers", type=count, default=None, help="make only the first layers")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="of the model (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.paths < 2:
        parser.error(f"--paths needs 2 or more, got {args.paths}: without branches there is nothing to compare")
    if args.threads is not None:
        set_threads(args.threads)
    args.path_tokens = args.path_tokens or PATH_TOKENS[args.device.type]
    tags = make_tags(newlines=False)
    try:
        answer = plan_block(tags, args.paths, args.path_tokens)
        make_prompts(1, args.prompt, make_config(args.geometry).vocab_size, make_goal(tags, args.paths)[:-1])
        # float64 beside the model: as if it had five times its parameters
        model = make_model(args.geometry, args.device, tags, args.seed, DTYPES[args.dtype], args.layers)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        load = Load(1, args.paths, args.prompt, answer.num_tokens, answer.length)
        cache_tokens = plan_cache(args.geometry, args.device, 4 * num_parameters, load)
    except ValueError as err:
        parser.error(str(err))
    result = {"benchmark": "replay_precision", **environment(args.device)}
    show_environment(result)
    print(f"random {args.geometry}, {num_parameters / 1e9:.2f} B parameters, {args.dtype}")
    result |= {"geometry": args.geometry, "parameters": num_parameters, "dtype": args.dtype, "layers": args.layers}
    result |= {"paths": args.paths, "path_tokens": args.path_tokens, "prompt_tokens": args.prompt}
    result |= measure(model, tags, answer, cache_tokens, args)
    plain, backward = result["plain"], result["plain_backward"]
    print(f"\ndistance from float64, over {result['chosen_tokens']} chosen tokens of {result['tokens']}")
    print(f"  text without branches       {plain:.3e}, gradient {backward:.3e}")
    for decoding, each in result["engine"].items():
        print(f"  engine, {decoding:16} {each:14.3e}, {each / plain:.2f} times that")
    for name, each in result["document"].items():
        print(f"  document, {name:16} {each:12.3e}, {each / plain:.2f} times that")
    for name, each in result["backward"].items():
        print(f"  gradient, {name:16} {each:12.3e}, {each / backward:.2f} times that")
    for name, error in result["errors"].items():
        print(f"  {name} does not run here: {error.splitlines()[0][:160]}")
    finish(result, args.output)


if __name__ == "__main__":
    main()
