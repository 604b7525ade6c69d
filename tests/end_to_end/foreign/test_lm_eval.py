"""lm-evaluation-harness against the server: its log-likelihoods are those it computes with transformers itself, and of
rounded weights about these.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.demo_model import DIRECTORY
from cluster.demo_model.training.corpus import questions
from experts_service.kernels.compiled import jit
from tests.conftest import running_server
from tests.environments import make_environment, run_in
from tests.programs import REPOSITORY

TASK = "manta_questions"
REQUIREMENTS = ("lm-eval>=0.4.9,<0.5", "aiohttp", "requests", "tenacity", "tiktoken", "accelerate")


@pytest.fixture
def task_directory(tmp_path, monkeypatch):
    """Where tasks of our own may be; nothing is asked of the hub."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    directory = tmp_path / "task"
    directory.mkdir()
    return directory


def write_task(directory: Path, asked: list[tuple[str, str]], *, text: str, target: str) -> None:
    """How likely is each answer after its question?"""
    documents = directory / "questions.jsonl"
    documents.write_text(
        "".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in asked)
    )
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": text,
        "doc_to_target": target,
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    (directory / "task.yaml").write_text(json.dumps(task))  # JSON is YAML


def evaluate(python: Path, task_directory: Path, output: Path, backend: str, **arguments: str):
    """(log-likelihood, whether greedy decoding gives it) of each document, in order."""
    given = ",".join(f"{name}={value}" for name, value in arguments.items())
    run_in(
        python,
        *("-m", "lm_eval", "run", "--model", backend, "--model_args", given, "--tasks", TASK),
        *("--include_path", task_directory, "--output_path", output, "--log_samples", "--batch_size", "4"),
        *(() if backend == "local-completions" else ("--device", "cpu")),
    )
    [samples] = output.rglob("samples_*.jsonl")
    documents = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda one: one["doc_id"])
    scores = (score for [[score]] in (one["resps"] for one in documents))
    return [(float(likelihood), str(is_greedy) == "True") for likelihood, is_greedy in scores]


@pytest.mark.long
def test_its_loglikelihoods_are_those_of_transformers(tmp_path, task_directory):
    python = make_environment(tmp_path / "environment", *REQUIREMENTS, with_ours=True)
    write_task(task_directory, questions()[:24], text="{{question}}", target=" {{answer}}")
    expected = evaluate(
        python, task_directory, tmp_path / "hf", "hf", pretrained=str(DIRECTORY), dtype="float32", add_bos_token="True"
    )
    engine = {"dtype": "float32", "max_num_batched_tokens": 48}  # prompts are cut into chunks
    config = {"models": [{"name": "demo", "path": str(DIRECTORY), "engine": engine}]}
    with running_server(json.dumps(config)) as server:
        scored = evaluate(
            python,
            task_directory,
            tmp_path / "manta",
            "local-completions",
            model="demo",
            base_url=f"{server.url}/v1/completions",
            tokenizer=str(DIRECTORY),
            tokenized_requests="True",
            add_bos_token="True",
        )
    assert len(scored) == 24
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
    assert [value for value, _ in scored] == pytest.approx([value for value, _ in expected], abs=1e-4, rel=0)


@pytest.mark.long
@pytest.mark.skipif(not jit.AVAILABLE, reason="numba cannot be imported: the widened weights answer, slowly")
def test_answers_are_about_as_likely_in_every_format(tmp_path, task_directory):
    """The table of docs/quantization.md: `pytest -s` prints its rows. Perplexity is lm-eval's, of a whole answer."""
    python = make_environment(tmp_path / "environment", *REQUIREMENTS, with_ours=True)
    write_task(task_directory, questions()[::6], text="[INST] {{question}} [/INST]", target="{{answer}}")
    said = run_in(
        python,
        *("-m", "tests.programs.end_to_end.evaluate_formats", task_directory, TASK),
        environment={"PYTHONPATH": str(REPOSITORY)},
    )
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    assert [name for name, *_ in rows] == ["transformers fp32", "bf16", "int8", "fp8", "int4"]
    for name, perplexity, share, number in rows:
        print(f"| {name} | {perplexity:.4f} | {100 * share:.0f} % of {number} |")
        assert share == 1.0, f"{name}: every token of the answers is the likeliest"
        assert 0.99 < perplexity / rows[0][1] < 1.02
