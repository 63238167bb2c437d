"""What a GPU replays as graphs, without a GPU: no work for the host in it, and the tables its kernels read."""

from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, TAGS, slow_unless, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from multiverse_hf.modeling import attention_static as static
from multiverse_hf.modeling.attention_packed import PackedRunner, Piece, Step, attend_sdpa, packed_attention
from multiverse_hf.modeling.attention_static import StaticShape, Visible, can_capture
from multiverse_hf.modeling.cache import LogCache
from multiverse_hf.modeling.hooks import engine_pass
from multiverse_hf.modeling.multiverse_engine import MultiverseEngine

META = torch.device("meta")
OUTLINE = [TAGS.open("outline"), 61, TAGS.close("outline")]
BLOCK = [60, TAGS.open("parallel"), TAGS.open("goal"), *OUTLINE, *OUTLINE, *OUTLINE, TAGS.close("goal")]
GROUPED = {"experts_implementation": "grouped_mm"}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class OnMeta(TorchDispatchMode):
    """Notes the operations that a tensor on another device than meta has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations, self.elsewhere = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.num_operations += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, torch.Tensor)]
        self.elsewhere += [str(func) for tensor in tensors if tensor.device != META]
        return output


def attend_nothing(query: torch.Tensor, key: torch.Tensor, *_: Any, block_mask: BlockMask, **__: Any) -> torch.Tensor:
    """Asks the mask, as a kernel does, and has no scores."""
    index = torch.zeros(3, dtype=torch.int32, device=query.device)
    assert block_mask.mask_mod(index, index, index, index).dtype == torch.bool
    assert block_mask.seq_lengths == (query.shape[2], key.shape[2])
    return torch.empty_like(query)


def forward_on_meta(model: torch.nn.Module) -> OnMeta:
    """Do what is captured with a model without memory: there a value that the host asks for is an error."""
    cache = LogCache(model.config.num_hidden_layers, 1000)
    runner = PackedRunner(model.to(META), cache)
    shape = StaticShape(model, cache, (8, 2, 16), Visible(5000, META), None, None)
    with torch.no_grad(), engine_pass(model, runner.configs, runner.attention), OnMeta() as meter:
        assert shape._forward().shape == (8, model.config.vocab_size)
    return meter


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("mistral", "gemma3_text")])
def test_a_captured_pass_computes_on_the_device_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(static, "flex_attention", attend_nothing)
    model = tiny_model(name, dtype=torch.bfloat16, **GROUPED if name == "qwen3_moe" else {})
    meter = forward_on_meta(model)
    assert not meter.elsewhere
    assert meter.num_operations > 100


def test_what_the_host_decides_is_not_captured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(static, "flex_attention", attend_nothing)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama", rope_parameters=rope)
    assert can_capture(tiny_model("llama"))
    assert not can_capture(model)
    with pytest.raises(RuntimeError, match=r"item\(\) cannot be called on meta"):
        forward_on_meta(model)


def static_step(width: int, heads: int, num_seqs: int, monkeypatch: pytest.MonkeyPatch, attend: Any) -> torch.Tensor:
    """Attend in a step of two sequences of many and few queries, at odd places of a pool of noise."""
    torch.manual_seed(0)
    count, cache = 32, LogCache(1, 700)
    visible = Visible(count * 290, torch.device("cpu"))
    visible.device.bernoulli_(0.5)

    class Model:
        device, dtype = torch.device("cpu"), torch.float32

        def __call__(self, multiverse_step: Any, **_: Any) -> Any:
            query, key = torch.randn(1, heads, count, 16), torch.randn(2, 1, 2, cache.capacity, 16)
            return SimpleNamespace(logits=multiverse_step(query, *key, None))

    shape = StaticShape(Model(), cache, (count, num_seqs, width), visible, None, None)
    first, inputs = min(width, 20), shape.inputs
    inputs["base"][:2], inputs["length"][:2] = torch.tensor([1, 301]), torch.tensor([140, 290])
    inputs["longest"].fill_(290)
    inputs["places"][:first], inputs["places"][width : width + 10] = torch.arange(first), torch.arange(20, 30)
    inputs["queries"][:first], inputs["queries"][20:30] = torch.arange(first), torch.arange(width, width + 10)
    monkeypatch.setattr(static, "flex_attention", attend)
    with torch.no_grad():
        return shape._forward()[torch.tensor([*range(first), *range(20, 30)])]


def as_on_a_gpu() -> Any:
    """Give the function that is compiled there, also where static's own flex_attention is another."""
    compiled = static._compiled()._torchdynamo_orig_callable
    return FunctionType(compiled.__code__, vars(static) | {"flex_attention": flex_attention})


def test_kernels_of_decoding_are_not_counted_with_those_of_training():
    assert as_on_a_gpu().__code__ is not flex_attention.__code__


@pytest.mark.long  # C++ is compiled
@pytest.mark.parametrize(("width", "heads", "num_seqs"), [(16, 4, 2), (16, 6, 4), (64, 8, 2), (256, 2, 2)])
def test_a_compiled_kernel_that_reads_the_listed_blocks_alone_sees_all_it_should(
    width: int, heads: int, num_seqs: int, monkeypatch: pytest.MonkeyPatch
):
    expected = static_step(width, heads, num_seqs, monkeypatch, flex_attention)  # looks at all keys
    compiled = torch.compile(as_on_a_gpu(), dynamic=False, fullgraph=True)
    found = static_step(width, heads, num_seqs, monkeypatch, compiled)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [16, 64, 256])
def test_the_queries_of_a_sequence_are_one_row_of_blocks(width: int, monkeypatch: pytest.MonkeyPatch):
    masks = []

    def attend(query: torch.Tensor, *_: Any, block_mask: BlockMask, **__: Any) -> torch.Tensor:
        masks.append(block_mask)
        return torch.zeros_like(query)

    static_step(width, 4, 2, monkeypatch, attend)
    (mask,) = masks
    assert mask.kv_num_blocks.shape == (2, 1, -(-width // mask.BLOCK_SIZE[0]))  # else a kernel reads past its end
    # slots 1 to 140, and 301 to 590, in blocks of 128
    assert mask.kv_num_blocks.flatten().tolist() == [2, 3]
    assert [row[:count] for row, count in zip(mask.kv_indices[:, 0, 0].tolist(), (2, 3), strict=True)] == [
        [0, 1], [2, 3, 4]
    ]  # fmt: skip


@pytest.mark.parametrize("heads", slow_unless([], [2, 6, 10]))
def test_static_decoding_chooses_the_same_whatever_the_number_of_query_heads(heads: int):
    model = tiny_model("qwen2", num_attention_heads=heads)
    options = {"max_new_tokens": 30, "seed": 3, "do_sample": True, "temperature": 8.0}
    answers = {}
    for decoding in ("static", "packed"):
        with MultiverseEngine(model, max_cache_tokens=400, decoding=decoding) as engine:
            answers[decoding] = [each.ids for each in engine.generate([BLOCK, [60, 61]], **options)]
            assert engine._engine.runner.name == decoding
    assert answers["static"] == answers["packed"]


@pytest.mark.slow
def test_kernels_are_few_and_no_longer_log_needs_another(monkeypatch: pytest.MonkeyPatch):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(as_on_a_gpu(), dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(static, "flex_attention", compiled)
    model = tiny_model("qwen2")
    with MultiverseEngine(model, max_cache_tokens=1500, decoding="static") as engine:
        for prompt in ([60], [61] * 300, BLOCK):
            engine.generate([prompt], max_new_tokens=20)
        shapes = engine._engine.runner.shapes
        assert len(shapes) > 1
        assert {shape[1:] for shape in shapes} == {(1, 16)}
        assert counter.frame_count == 1
    assert not shapes, "graphs go with the cache whose address they know"


def test_the_mask_of_a_layer_is_not_taken_for_that_of_another_whose_copy_is_gone():
    """On several devices each layer gets a copy of its mask, one after the other is let go."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    masks = [torch.zeros(1, 1, 2, 5).masked_fill(torch.rand(1, 1, 2, 5) < 0.5, -1e9) for _ in range(2)]
    step = Step([Piece(slice(0, 2), slice(0, 5), slice(0, 5))], attend_sdpa)
    module = torch.nn.Module()
    for mask in masks * 3:
        ours, _ = packed_attention(module, query, key, key, mask.clone(), multiverse_step=step)
        theirs = torch.nn.functional.scaled_dot_product_attention(query, key, key, mask, enable_gqa=True)
        torch.testing.assert_close(ours, theirs.transpose(1, 2))


def test_slots_follow_the_keys_to_their_device():
    cache = LogCache(1, 20)
    cache.prepare([(1, 3), (6, 7)], torch.device("cpu"))
    states = torch.randn(1, 2, 3, 8, device=META)
    cache.update(states, states, 0)
    with OnMeta() as meter:
        cache.update(states, states, 0)
    assert set(meter.elsewhere) <= {"aten._to_copy.default"}


@pytest.mark.parametrize("decoding", ["packed", "simple"])
def test_a_model_on_several_devices_is_told_which_logits_are_wanted_by_numbers(decoding: str):
    """A tensor would be brought to the first device, and index what the last layer gave on another."""
    model = tiny_model("qwen2")
    kept, answers = [], []
    hook = model.register_forward_pre_hook(lambda _, __, given: kept.append(given["logits_to_keep"]), with_kwargs=True)
    for is_spread in (False, True):
        with MultiverseEngine(model, max_cache_tokens=400, decoding=decoding) as engine:
            engine._engine.runner.is_spread = is_spread
            answers.append([each.ids for each in engine.generate([BLOCK, [60, 61]], max_new_tokens=20)])
            assert {type(each) for each in kept} == {list if is_spread else torch.Tensor}
            kept.clear()
    hook.remove()
    assert answers[0] == answers[1]
