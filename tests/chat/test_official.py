"""Folders in official layouts, opened for use: they answer as the model did that was saved, and as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chat_toys import LLAMA, picture, talker
from PIL import Image
from published import GRIDS, IMAGENET, SQUASHED, fresh, publish
from tokenizers import processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipConfig,
    SiglipModel,
)

from lightning_internvl.chat.session import Sampling, Session
from lightning_internvl.data.jinja_templates import jinja_of
from lightning_internvl.data.templates import load_template
from lightning_internvl.data.tokenizer import toy_tokenizer
from lightning_internvl.inference.load_official import open_model
from lightning_internvl.inference.picture_search import Retriever
from lightning_internvl.inference.published_systems import SYSTEMS, named

SHORT = Sampling(max_new_tokens=6)
# Recipe and overrides; the layout that holds it; what stands in preprocessor_config.json; what is asked for.
CASES = {
    "internvl_native": ("internvl_1_5_toy", [], IMAGENET | {"max_patches": 4}, {}),
    "llava_native": ("llava_toy", [], {}, {"pictures": "pad_square"}),
    "llava_next": ("llava_next_toy", [], GRIDS, {}),
    "llava_onevision": ("llava_onevision_toy", [], {}, {}),
    "qwen2_vl": ("qwen2_vl_toy", [], {"min_pixels": 2304, "max_pixels": 96 * 96}, {}),
    "qwen3_vl": ("qwen3_vl_toy", [], {"min_pixels": 2304, "max_pixels": 96 * 96}, {}),
    "qwen2_5_vl": ("qwen2_5_vl_toy", [], {"min_pixels": 2304, "max_pixels": 96 * 96}, {}),
    "blip2_hf": ("blip2_toy", [], SQUASHED, {}),
    "blip2_hf with T5": ("blip2_toy", ["decoder=t5_toy", "data.chats_collate.template=blip2_t5"], SQUASHED, {}),
    "instructblip_hf": ("instructblip_toy", [], SQUASHED, {}),
    "deepseek_vl_hf": ("deepseek_vl_toy", [], {"resample": 2}, {}),
    "qwen_vl": ("qwen_vl_toy", [], IMAGENET, {}),
    "minigpt4": ("minigpt4_toy", [], IMAGENET, {}),
    "xcomposer2": ("xcomposer2_toy", [], IMAGENET, {}),
    "open_flamingo": ("flamingo_toy", [], IMAGENET, {"pictures": "squash"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_answers_as_before(case: str, tmp_path: Path) -> None:
    recipe, overrides, fields, asked = CASES[case]
    view, tokenizers = fresh(recipe, overrides)
    folder, layout = tmp_path / "saved", case.partition(" ")[0]
    view.model.save_pretrained(folder, layout=layout)
    view.chats.tokenizer.save_pretrained(folder)
    if "middleware" in tokenizers:
        tokenizers["middleware"].save_pretrained(folder / "qformer_tokenizer")
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    template = view.chats.template
    found = open_model(folder, template=template.name, system=template.system, **asked)
    assert found.layout == layout
    talks = Session(view.model, view.chats), Session(found.view.model, found.view.chats)
    sample = {"images": [picture(0, 70, 100)], "conversation": [{"role": "user", "content": "<image>\nwhat?"}], "key": "one"}
    ours, theirs = (talk.chats.prompts([sample]) for talk in talks)
    assert (ours["input_ids"] == view.model.image_token_id).equal(theirs["input_ids"] == found.view.model.image_token_id)
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    for talk in talks:
        talk.show(picture(0, 70, 100))
    first, second = ([list(talk.ask(question, SHORT)) for question in ("what is it?", "and why?")] for talk in talks)
    assert [pieces[-1] for pieces in first] == [pieces[-1] for pieces in second]


def test_llava_reads_and_answers_as_in_transformers(tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(["<image>"])
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = LLAMA | {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2}
    vision = {name: size for name, size in LLAMA.items() if name != "model_type"} | {"image_size": 24, "patch_size": 6}
    vision |= {"model_type": "clip_vision_model", "num_hidden_layers": 2}
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, mean=float(parameter.ndim == 1), std=0.2)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=6, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "llava")
    processor.save_pretrained(tmp_path / "llava")
    # The published chat format, with the first token written out: the toy tokenizer adds none by itself.
    prompt = "<s>USER: <image>\nwhat is it? ASSISTANT:"
    inputs = processor(images=Image.fromarray(picture(0, 50, 70)), text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]

    found = open_model(tmp_path / "llava")
    talk = Session(found.view.model, found.view.chats)
    sample = {"images": [picture(0, 50, 70)], "conversation": [{"role": "user", "content": "<image>\nwhat is it?"}], "key": "one"}
    batch = found.view.chats.prompts([sample])
    assert batch["input_ids"].equal(inputs["input_ids"])
    torch.testing.assert_close(batch["pixel_values"], inputs["pixel_values"])
    talk.show(picture(0, 50, 70))
    assert list(talk.ask("what is it?", SHORT))[-1] == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_an_exported_folder_says_its_own_chat_format(tmp_path: Path) -> None:
    view, _ = fresh("llava_toy", [])
    view.model.save_pretrained(tmp_path / "saved")
    template = view.chats.template.with_system('Say "yes".')
    view.chats.tokenizer.chat_template = jinja_of(template, "<img><IMG_CONTEXT></img>")
    view.chats.tokenizer.save_pretrained(tmp_path / "saved")
    chats = open_model(tmp_path / "saved").view.chats
    assert chats.template.with_system("") == view.chats.template.__class__(
        **vars(template) | {"name": chats.template.name, "system": ""}
    )
    assert chats.template.system == 'Say "yes".'
    assert (chats.image_tokens.start, chats.image_tokens.end) == ("<img>", "</img>")
    # as versions before wrote it, which refused two messages of a user in a row
    now, before = "(not loop.last and loop.nextitem['role'] == 'assistant')", "not loop.last"
    assert now in view.chats.tokenizer.chat_template
    view.chats.tokenizer.chat_template = view.chats.tokenizer.chat_template.replace(now, before)
    view.chats.tokenizer.save_pretrained(tmp_path / "saved")
    assert open_model(tmp_path / "saved").view.chats.template == chats.template


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_and_pictures_are_compared_as_in_transformers(kind: str, tmp_path: Path) -> None:
    tokenizer = toy_tokenizer(["<end>"])
    tokenizer.eos_token = "<end>"
    sizes = {name: size for name, size in LLAMA.items() if name != "model_type"} | {"num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 24}
    made = {"text_config": text | {"projection_dim": 16}, "vision_config": sizes | {"image_size": 16, "patch_size": 8}}
    classes = {"clip": (CLIPConfig, CLIPModel), "siglip": (SiglipConfig, SiglipModel)}[kind]
    torch.manual_seed(0)
    model = classes[1](classes[0](**made)).eval()
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    found = open_model(tmp_path / kind)
    assert (found.layout, found.view.chats) == (kind, None)
    retriever = Retriever(found.view.model, found.view.pairs)
    ids, bos, end = tokenizer.encode("a red cat", add_special_tokens=False), tokenizer.bos_token_id, tokenizer.eos_token_id
    row = [bos, *ids, end] + ([tokenizer.pad_token_id] * (22 - len(ids)) if kind == "siglip" else [])
    with torch.no_grad():
        theirs = model.get_text_features(torch.tensor([row])).pooler_output
    torch.testing.assert_close(retriever.texts(["a red cat"]), torch.nn.functional.normalize(theirs, dim=-1))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / kind)  # one that ends rows by itself is taken at its word
    rows, _ = open_model(tmp_path / kind).view.pairs.rows("itc", ["a red cat"])
    assert rows[0][: len(ids) + 1] == [*ids, end]
    assert len(rows[0]) == (24 if kind == "siglip" else len(ids) + 1)


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    view, _ = fresh("llava_toy", [])
    view.model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare holds no tokenizer .*give tokenizer=FOLDER_OR_ID"):
        open_model(tmp_path / "bare")
    view.chats.tokenizer.save_pretrained(tmp_path / "words")
    assert open_model(tmp_path / "bare", tokenizer=tmp_path / "words").layout == "llava_native"
    with pytest.raises(ValueError, match="template='vicunna' is not known; did you mean 'vicuna'"):
        open_model(tmp_path / "bare", template="vicunna")
    with pytest.raises(ValueError, match="encoder Qwen2ViT reads image_grid_thw"):
        open_model(saved_qwen(tmp_path / "qwen"), pictures="squash")


def saved_qwen(folder: Path) -> Path:
    view, _ = fresh("qwen2_vl_toy", [])
    view.model.save_pretrained(folder)
    view.chats.tokenizer.save_pretrained(folder)
    return folder


def test_an_unknown_chat_format_of_a_release_is_named(tmp_path: Path) -> None:
    view, _ = fresh("internvl_1_5_toy", [])
    view.model.save_pretrained(tmp_path / "saved", layout="internvl_chat")
    view.chats.tokenizer.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    names = {"internlm2-chat": "internlm2", "vicuna_v1.1": "vicuna"}
    for name in ("internlm2-chat", "vicuna_v1.1", "internvl2_5", "Hermes-2", "phi3-chat", "internvl_zh", "internvl3_5_gpt_oss"):
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"template": name, "system_message": None}))
        assert open_model(tmp_path / "saved").view.chats.template == load_template(names.get(name, name))
    language = {"llm_config": config["llm_config"] | {"model_type": "internlm2"}}
    assert named(SYSTEMS["internvl_chat"].template, language | {"template": "internvl2_5"}, view.model) == "internvl2_5_internlm"
    for said in ("Hello.", ""):
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"template": "Hermes-2", "system_message": said}))
        assert open_model(tmp_path / "saved").view.chats.template.system == said
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"template": "phi9"}))
    with pytest.raises(ValueError, match="'phi9', which is not known here; give template=NAME"):
        open_model(tmp_path / "saved")
    assert open_model(tmp_path / "saved", template="plain").view.chats.template.name == "plain"


def test_tokens_around_a_picture_of_the_first_llava(tmp_path: Path) -> None:
    publish("llava", tmp_path / "saved")
    for file in (tmp_path / "saved").glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<img>", "<im_start>").replace("</img>", "<im_end>"))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    asked = {"images": [picture(0, 50, 70)], "conversation": [{"role": "user", "content": "<image>\nwhat?"}], "key": "one"}
    for framed in (False, True):
        (tmp_path / "saved" / "config.json").write_text(json.dumps(config | {"mm_use_im_start_end": framed}))
        chats = open_model(tmp_path / "saved").view.chats
        text = chats.tokenizer.decode(chats.prompts([asked])["input_ids"][0])
        assert ("<im_start><IMG_CONTEXT>" in text, "<IMG_CONTEXT><im_end>\nwhat?" in text) == (framed, framed)


def test_a_conversation_fits_what_the_model_reads() -> None:
    model, chats = talker(context=256)
    assert Session(model, chats).chats.max_length == 255
    assert chats.max_length == 64  # the run's own stays
