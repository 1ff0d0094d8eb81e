"""The chat template of what a run started from: kept where the run did not change the format, with the ids of training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lightning_internvl.config.targets import build
from lightning_internvl.export.base_folder import base_chat_template, licence_of
from lightning_internvl.export.layout_choice import choose_layout
from lightning_internvl.export.processors import KEPT, write_processor
from lightning_internvl.export.run_facts import run_config
from lightning_internvl.inference.load_run import LoadedRun, open_run

MakeRun = Callable[..., Path]
# As published with OpenGVLab/InternVL3-1B-hf, llava-hf/llava-1.5-7b-hf and Qwen/Qwen2-VL-2B-Instruct.
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATS = "data.chats_collate"
BASES = {
    "internvl_1_5_toy": (INTERNVL, (f"{CHATS}.template=chatml",)),
    "llava_toy": (
        LLAVA.replace("<image>", "<IMG_CONTEXT>"),
        (f"{CHATS}.template=vicuna", f"++{CHATS}.system=''", f"++{CHATS}.image_frame=[]"),
    ),
}


def started_from(run: Path, template: str, adds_bos: bool) -> LoadedRun:
    """The run with a tokenizer that has brought a base's template, and, as LLaMA's, its own first token."""
    opened = open_run(run, build)
    tokenizer = opened.view.chats.tokenizer
    tokenizer.chat_template = template
    if adds_bos:
        bos = tokenizer.bos_token
        first = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = first
    return opened


def written(opened: LoadedRun, folder: Path) -> str:
    """What is said of the processor's files, which alone are written."""
    folder.mkdir()
    layout, config = choose_layout(opened.view.model, None)
    return write_processor(folder, layout.key, config, opened.view, run_config(opened)["init_from"]).verdict


@pytest.mark.parametrize("recipe", BASES)
def test_the_template_of_the_base_is_kept_where_it_makes_the_ids_of_training(
    make_run: MakeRun, tmp_path: Path, recipe: str
) -> None:
    template, overrides = BASES[recipe]
    opened = started_from(make_run(recipe, *overrides), template, adds_bos=recipe == "llava_toy")
    assert written(opened, tmp_path / "out").endswith(KEPT)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    two = [{"role": "user", "content": [{"type": "text", "text": text}]} for text in "ab"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(two, tokenize=False).index("b")  # several messages in a row are no error


def test_of_qwen2_vl_the_text_is_that_of_a_processor_of_an_older_folder(make_run: MakeRun, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": QWEN2_VL}))
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base")
    run = make_run("qwen2_vl_toy", f"{CHATS}.template=qwen2_vl", f"++{CHATS}.system=null", f"init_from={base}")
    opened = open_run(run, build)
    assert base_chat_template(base, opened.view.chats.tokenizer) == QWEN2_VL
    assert written(opened, tmp_path / "out").endswith(KEPT)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == QWEN2_VL
    assert licence_of(base) == "apache-2.0"


def test_a_format_that_the_run_changed_is_the_one_that_is_written(make_run: MakeRun, tmp_path: Path) -> None:
    template, overrides = BASES["internvl_1_5_toy"]
    opened = started_from(make_run("internvl_1_5_toy", *overrides, f"++{CHATS}.system='Be brief.'"), template, adds_bos=False)
    assert not written(opened, tmp_path / "out").endswith(KEPT)
    assert 'system="Be brief."' in (tmp_path / "out" / "chat_template.jinja").read_text()


def test_a_base_that_states_no_licence(tmp_path: Path) -> None:
    assert licence_of(None) is licence_of(tmp_path) is None
    for text in ("# no fields", "---\n[\n---\n", "---\nlicense: [1]\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert licence_of(tmp_path) is None
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert licence_of(tmp_path) == "mit"
