"""One model in two processes, started by torchrun: every process writes what one process alone would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from multiverse_hf import MultiverseForCausalLM
from multiverse_hf.checkpoints import EMBEDDED, open_checkpoint

pytestmark = pytest.mark.slow

PROMPTS = ["A=19-7+12; B=8+15-3; total?", "A=1+2; B=3+4; C=5-1; total?"]
SAMPLED = {"max_new_tokens": 120, "do_sample": True, "temperature": 1.3, "seed": 3}
FOREVER = {"max_new_tokens": 4000, "do_sample": True, "temperature": 3.0, "seed": 3, "structure": "off"}

WORKER = """
import json, os, sys, time, torch
from transformers.distributed import DistributedConfig
from multiverse_hf import MultiverseEngine, MultiverseForCausalLM


path, folder, arguments = sys.argv[1:]
arguments = json.loads(arguments)
prompts, sampled, forever = arguments["prompts"], arguments["sampled"], arguments["forever"]
rank, said = int(os.environ["RANK"]), {}
model = MultiverseForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float64)
said["heads"] = model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0]
said["generate"] = [model.generate(torch.tensor([ids]), **sampled)[0, len(ids):].tolist() for ids in prompts]
said["late"] = len(model.generate(torch.tensor([prompts[0]]), **forever, max_time=0.3)[0])
try:
    model.generate(torch.tensor([prompts[0]]), do_sample=True, max_new_tokens=5)
except ValueError as err:
    said["error"] = str(err)
model = MultiverseForCausalLM.from_pretrained(
    path, distributed_config=DistributedConfig(tp_size=2), dtype=torch.float64
)
with MultiverseEngine(model, max_cache_tokens=700, max_num_seqs=3) as engine:  # some wait, some are preempted
    time.sleep(0.3 * rank)  # the processes do not run in step by themselves
    said["engine"] = [result.ids for result in engine.generate(prompts * 3, **sampled)]
    handle = engine.submit(prompts[0], **forever)
    time.sleep(0.3)
    handle.cancel()
    said["cancelled"] = handle.result(timeout=1800).ids
    said["finish"] = handle.result().finish_reason
    said["late in the engine"] = [len(r.ids) for r in engine.generate(prompts, **forever, max_time=0.3)]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(said, file)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    checkpoint = open_checkpoint(None)
    return [checkpoint.encode(prompt) for prompt in PROMPTS]


def test_two_processes_write_what_one_does(tmp_path: Path, prompts: list[list[int]]) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    arguments = json.dumps({"prompts": prompts, "sampled": SAMPLED, "forever": FOREVER})
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
        tmp_path / "worker.py", EMBEDDED, tmp_path, arguments,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second, "also where the clock and a caller ended an answer"
    model = MultiverseForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float64)
    assert first["heads"] == model.model.layers[0].self_attn.q_proj.weight.shape[0] // 2
    alone = [model.generate(torch.tensor([ids]), **SAMPLED)[0, len(ids) :].tolist() for ids in prompts]
    assert first["generate"] == alone
    assert first["engine"][:2] == alone, "equal prompts that follow have noise of their own"
    assert first["finish"] == "cancelled"
    assert first["cancelled"]
    assert "seed=" in first["error"]
