"""The endpoint of ``multiverse serve``, asked by other people's clients."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("prometheus_client")
sys.path.insert(0, str(Path(__file__).parents[1]))
from endpoint import serving

pytestmark = pytest.mark.slow
ASKED = "A=19-7+12; B=8+15-3; total? Think step by step and in parallel before answering."
MODEL = "multiverse-tiny"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as served:
        yield f"{served.url}/v1"


def test_langchain_openai(url: str) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(model=MODEL, base_url=url, api_key="none", temperature=0, stream_usage=True)
    reply = chat.invoke(ASKED)
    assert reply.content == "Answer: 44"
    assert reply.usage_metadata["output_token_details"]["reasoning"] > 0
    chunks = list(chat.stream(ASKED))
    assert "".join(chunk.content for chunk in chunks) == "Answer: 44"
    assert [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata][-1]["output_tokens"] > 100
    assert [each.content for each in chat.batch([ASKED] * 3)] == ["Answer: 44"] * 3
    parsed = chat.with_structured_output(
        {
            "title": "sum",
            "type": "object",
            "properties": {"total": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["total"],
            "additionalProperties": False,
        },
        method="json_schema",
    ).invoke(ASKED)
    assert isinstance(parsed["total"], int)
    again = langchain_openai.ChatOpenAI(model=MODEL, base_url=url, api_key="none", use_responses_api=True)
    assert again.invoke(ASKED).text.endswith("Answer: 44")


def test_llm(url: str, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    model = f"- model_id: tiny\n  model_name: {MODEL}\n  api_base: {url}\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none", "LLM_LOAD_PLUGINS": ""}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    for options in ([], ["--no-stream"]):
        command = [sys.executable, "-m", "llm", "-m", "tiny", *options, ASKED]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("Answer: 44")


def test_inspect_ai(url: str, tmp_path: Path) -> None:
    pytest.importorskip("inspect_ai")
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.scorer import match

    samples = [Sample(input=ASKED, target="44"), Sample(input=ASKED.replace("19", "18"), target="43")]
    (log,) = eval(
        Task(dataset=samples, scorer=match(location="end")),
        model=f"openai-api/multiverse/{MODEL}",
        model_base_url=url,
        model_args={"api_key": "none"},
        log_dir=str(tmp_path),
        display="none",
        max_tokens=400,
        temperature=0,
    )
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1
    assert log.stats.model_usage[f"openai-api/multiverse/{MODEL}"].reasoning_tokens > 0


def test_lm_eval(url: str, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("lm_eval.models.openai_completions")
    rows = [{"question": ASKED, "answer": "44"}, {"question": ASKED.replace("19", "18"), "answer": "43"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "Answer: {{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 400, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    results = lm_eval.simple_evaluate(
        model="local-chat-completions",
        model_args=f"model={MODEL},base_url={url}/chat/completions,num_concurrent=2",
        tasks=["sums"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        log_samples=True,
    )
    assert results["results"]["sums"]["exact_match,none"] == 1, results["samples"]
