"""How many threads the engine's steps take."""

import contextlib
import os
import subprocess
import sys
import types

import pytest
import torch
from helpers import tiny_model

from multiverse_hf.modeling import threads
from multiverse_hf.modeling.hooks import engine_pass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Clocked(torch.nn.Module):
    """A model that computes nothing: each pass takes a set time of the clock, by the number of threads."""

    device = torch.device("cpu")

    def __init__(self, seconds, clock, num_parameters=1000):
        super().__init__()
        self.seconds, self.clock, self.passes = seconds, clock, []
        self.weight = torch.nn.Parameter(torch.empty(num_parameters, device="meta"))

    def forward(self, input_ids, use_cache):
        self.passes.append((input_ids.shape[1], torch.get_num_threads()))
        self.clock.now += self.seconds[torch.get_num_threads()]


@pytest.fixture
def clock(monkeypatch):
    """Two threads that nobody asked for, and a clock that only passes move."""
    now = types.SimpleNamespace(now=0.0)
    own = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_DEFAULT", 2)
    monkeypatch.setattr(threads, "_keeps", False)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now.now)
    torch.set_num_threads(2)
    yield now
    torch.set_num_threads(own)


@pytest.mark.parametrize(
    ("alone", "together", "expected"),
    [(0.002, 0.001, 2), (0.002, 0.0019, 1), (0.002, 0.1, 1), (0.002, 30.0, 1)],
    ids=["twice as fast", "hardly faster", "machine is busy", "one pass takes all the time"],
)
def test_the_better_number_of_threads_is_taken_and_set_back(clock, alone, together, expected):
    model = Clocked({1: alone, 2: together}, clock)
    for _ in range(2):
        assert threads.best_threads(model, 32) == expected
        assert torch.get_num_threads() == 2
        passes = len(model.passes)
    assert threads.step_threads(model) == expected
    assert {width for width, _ in model.passes} == {32}
    assert threads.best_threads(model, 32) == expected
    assert len(model.passes) == passes  # measured once


@pytest.mark.parametrize("how", ["variable", "torch", "ours", "large model", "long step"])
def test_a_choice_that_was_made_and_a_large_step_keep_torchs_number(clock, monkeypatch, how):
    model = Clocked({1: 0.0, 2: 1.0, 3: 1.0}, clock, 1 << 30 if how == "large model" else 1000)
    if how == "variable":
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    elif how == "torch":
        torch.set_num_threads(3)
    elif how == "ours":
        threads.set_threads(2)
    assert threads.best_threads(model, None if how == "long step" else 32) is None
    assert not model.passes


@pytest.mark.parametrize("number", [1, None])
def test_a_pass_of_the_engine_takes_its_number_and_sets_it_back(clock, number):
    model = tiny_model("qwen2")
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), engine_pass(model, [model.config], "sdpa", (), number):
            assert torch.get_num_threads() == (number or 2)
            if error:
                raise error
        assert torch.get_num_threads() == 2


SCRIPT = """
import torch
from multiverse_hf.checkpoints import *
from multiverse_hf.data.suffixes import Suffix
from multiverse_hf.modeling import threads
from multiverse_hf.modeling.hooks import engine_pass
checkpoint = open_checkpoint(None)
torch.set_num_threads(2)
threads._DEFAULT = 2  # as on a machine of two cores
model = load_model(checkpoint, Dtype.AUTO, Attention.SDPA, "cpu", None)
prompt = checkpoint.encode(Suffix.PARALLEL.end("A=19-7+12; B=8+15-3; total?"))
answers = [answer_prompt(model, checkpoint, prompt, do_sample=False, max_new_tokens=300).document]
assert set(threads._chosen[model]) <= set(threads.WIDTHS) and threads._chosen[model], threads._chosen[model]
assert torch.get_num_threads() == 2
threads.set_threads(1)
answers.append(answer_prompt(model, checkpoint, prompt, do_sample=False, max_new_tokens=300).document)
assert answers[0] == answers[1] and "<Path>" in answers[0], answers
"""


@pytest.mark.slow
def test_generate_measures_and_answers_the_same():
    variables = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    variables["PYTHONPATH"] = os.path.join(ROOT, "src")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
