"""Engines that read an export, by stand-ins with their interface, and by llama.cpp itself where it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_internvl.config.targets import build
from lightning_internvl.export import engines
from lightning_internvl.export.report import ExportOptions
from lightning_internvl.export.write import export
from lightning_internvl.inference.load_run import open_run

# Each answers with the log-probabilities that lie in answers.json of the model's folder.
STAND_INS = {
    "vllm": """
import json, types
class SamplingParams:
    def __init__(self, temperature, max_tokens, logprobs):
        assert (temperature, max_tokens) == (0.0, 1)
        self.logprobs = logprobs
class LLM:
    def __init__(self, model, dtype, enforce_eager, trust_remote_code, limit_mm_per_prompt):
        assert (dtype, trust_remote_code) == ("float32", False)
        self.answers = json.load(open(model + "/answers.json"))
    def generate(self, prompts, params):
        for prompt in prompts:
            logs = self.answers[str(prompt["prompt_token_ids"])]
            best = sorted(range(len(logs)), key=lambda token: -logs[token])[: params.logprobs]
            place = {token: types.SimpleNamespace(logprob=logs[token]) for token in best}
            yield types.SimpleNamespace(outputs=[types.SimpleNamespace(logprobs=[place])])
""",
    "llama_cpp": """
import json
GGML_TYPE_F32 = 0
class Llama:
    def __init__(self, model_path, n_ctx, n_gpu_layers, logits_all, type_k, type_v, verbose):
        assert logits_all and type_k == type_v == 0
        self.answers = json.load(open(model_path + "/answers.json"))
    def reset(self):
        self.scores = []
    def eval(self, tokens):
        self.scores = [None] * (len(tokens) - 1) + [[2 + log for log in self.answers[str(tokens)]]]
""",
}
PACKAGES = {"vllm": "vllm", "llama_cpp": "llama_cpp_python"}
VIEW = SimpleNamespace(chats=SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda *given, **options: [5])))
ROWS = [[3, 1], [3, 1, 4]]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[torch.Tensor]]:
    """A function of a reader that installs its stand-in, which answers as the log-probabilities returned do."""

    def install(reader: str) -> list[torch.Tensor]:
        place = tmp_path / "packages"
        place.mkdir()
        (place / f"{reader}.py").write_text(STAND_INS[reader])
        (place / f"{PACKAGES[reader]}-9.1.dist-info").mkdir()
        (place / f"{PACKAGES[reader]}-9.1.dist-info" / "METADATA").write_text(f"Name: {PACKAGES[reader]}\nVersion: 9.1\n")
        monkeypatch.syspath_prepend(place)
        monkeypatch.setenv("PYTHONPATH", str(place))
        monkeypatch.setitem(engines.PACKAGES, reader, (reader,))
        wanted = list(torch.randn(len(ROWS), 40).log_softmax(-1))
        monkeypatch.setattr(engines, "next_tokens", lambda view: (ROWS, wanted))
        monkeypatch.setattr(engines, "_gguf", lambda folder, _: folder)
        answers = {str(row): logs.tolist() for row, logs in zip(ROWS, wanted, strict=True)}
        (tmp_path / "answers.json").write_text(json.dumps(answers))
        return wanted

    return install


@pytest.mark.parametrize("reader", STAND_INS)
def test_it_is_run_and_compared(stand_in: Callable[[str], list[torch.Tensor]], tmp_path: Path, reader: str) -> None:
    wanted = stand_in(reader)
    said = engines.run_engine(reader, tmp_path, VIEW)
    assert said.startswith(f"{PACKAGES[reader].replace('_', '-')} 9.1 gives log-probabilities of 2 next tokens of texts within ")
    assert said.endswith(", 2 greedy ids of 2 equal")
    wanted[1] = wanted[1] + 0.05  # of other weights
    with pytest.raises(ValueError, match=rf"the export failed its check: {reader}: .* within 5\.0e-02, more than 0\.0"):
        engines.run_engine(reader, tmp_path, VIEW)


def test_an_engine_that_does_not_read_it_says_why(stand_in: Callable[[str], Any], tmp_path: Path) -> None:
    stand_in("vllm")
    (tmp_path / "answers.json").unlink()
    with pytest.raises(ValueError, match=r"vllm \(vllm\) does not read it: FileNotFoundError"):
        engines.run_engine("vllm", tmp_path, VIEW)


def test_without_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines.PACKAGES, "llama_cpp", ("no_such_package", "nor_this"))
    assert engines.run_engine("llama_cpp", tmp_path, VIEW) == "it was not run: no_such_package or nor_this is not installed"


def test_a_token_that_only_one_side_writes_is_a_difference() -> None:
    ours = torch.tensor([0.9, 0.05, 0.05]).log()
    assert engines.difference(ours, {1: float(ours[1]), 2: float(ours[2])}) == pytest.approx(float(ours[0] - ours[1]))


def test_what_is_compared_is_what_the_model_writes(make_run: Callable[..., Path]) -> None:
    view = open_run(make_run("llava_toy"), build).view
    rows, wanted = engines.next_tokens(view)
    assert len(rows) == len(wanted) == 24  # three questions, eight tokens each
    following = [row[-1] for row in rows[1:8]]
    assert [int(logs.argmax()) for logs in wanted[:7]] == following
    one = view.model(input_ids=torch.tensor([rows[5]]), attention_mask=torch.ones(1, len(rows[5]), dtype=torch.long))
    torch.testing.assert_close(one.logits[0, -1].float().log_softmax(-1), wanted[5], rtol=0, atol=1e-5)


def test_llama_cpp_itself(make_run: Callable[..., Path], tmp_path: Path) -> None:
    for package in ("xllamacpp", "gguf"):
        pytest.importorskip(package)
    report = export(open_run(make_run("llava_toy"), build), tmp_path / "out", ExportOptions(readers=("llama_cpp",)))
    assert report.rules[0].endswith("24 greedy ids of 24 equal")
