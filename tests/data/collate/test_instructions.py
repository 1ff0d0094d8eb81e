"""Q-Former instructions, prompts and answers apart, the templates of the BLIP-2 family, and rows that begin as BERT's do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from lightning_internvl.data.collate.chats import ChatCollator
from lightning_internvl.data.collate.encode import ImageTokens, TooLong, encode_conversation, encode_prompt
from lightning_internvl.data.collate.instructions import Instructions, encode_question
from lightning_internvl.data.collate.pairs import PairCollator
from lightning_internvl.data.processors.basic import Squash, Tiles
from lightning_internvl.data.templates import Message, load_template
from lightning_internvl.data.tokenizer import bert_tokenizer, toy_tokenizer

NO_FRAME = ImageTokens(start=None, end=None)
CHAT = [
    {"role": "user", "content": "<image>\nhow many apples are there?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "where is the cat?"},
    {"role": "assistant", "content": "two apples"},
]
VQA = CHAT[:2]


@pytest.fixture(scope="module")
def toy() -> PreTrainedTokenizerFast:
    return toy_tokenizer()


def sample(conversation: list[dict[str, str]], pictures: int = 1, key: str = "k") -> dict[str, object]:
    return {"images": [np.zeros((8, 8, 3), np.uint8)] * pictures, "conversation": conversation, "key": key}


def words(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("template", "read", "learnt"),
    [
        ("blip2", "{v}</s>Question: how many apples are there? Short answer:", " two\n"),
        ("blip2_caption", "{v}</s>", "two\n"),
        ("instructblip", "{v}</s>how many apples are there?", " two</s>"),
    ],
)
def test_templates_of_causal_decoders(toy: PreTrainedTokenizerFast, template: str, read: str, learnt: str) -> None:
    ids, labels = encode_conversation(VQA, load_template(template), toy, [3], 100, "k", NO_FRAME)
    begin = read.format(v="<IMG_CONTEXT>" * 3)
    assert words(toy, ids) == begin + learnt
    assert words(toy, [label for label in labels if label != -100]) == learnt
    assert words(toy, encode_prompt(VQA[:1], load_template(template), toy, [3], 100, "k", NO_FRAME)) == begin


@pytest.mark.parametrize(
    ("template", "read"),
    [
        ("blip2_t5", "{v}Question: how many apples are there? Short answer:</s>"),
        ("blip2_t5_caption", "{v}</s>"),
        ("instructblip_t5", "{v}how many apples are there?</s>"),
    ],
)
def test_templates_of_encoder_decoders(toy: PreTrainedTokenizerFast, template: str, read: str) -> None:
    prompt, answer = encode_question(VQA, load_template(template), toy, [3], 100, "k", NO_FRAME)
    assert words(toy, prompt) == read.format(v="<IMG_CONTEXT>" * 3)
    assert words(toy, answer) == "two</s>"


def test_an_encoder_decoder_writes_the_last_answer_and_reads_all_before(toy: PreTrainedTokenizerFast) -> None:
    prompt, answer = encode_question(CHAT, load_template("instructblip_t5"), toy, [1], 100, "k", NO_FRAME)
    assert words(toy, prompt) == "<IMG_CONTEXT>how many apples are there?</s>two</s>where is the cat?</s>"
    assert words(toy, answer) == "two apples</s>"
    with pytest.raises(TooLong, match="sample k: the prompt has"):
        encode_question(CHAT, load_template("instructblip_t5"), toy, [1], 5, "k", NO_FRAME)
    with pytest.raises(TooLong, match="its answer has 3 tokens, more than max_length=2"):
        encode_question([VQA[0], CHAT[3]], load_template("blip2_t5_caption"), toy, [1], 2, "k", NO_FRAME)
    with pytest.raises(ValueError, match="sample k: the conversation must end with an answer"):
        encode_question(CHAT[:3], load_template("blip2_t5"), toy, [1], 100, "k", NO_FRAME)


def test_an_encoder_decoder_writes_the_last_answer_that_is_learnt(toy: PreTrainedTokenizerFast) -> None:
    unlearnt: Message = {"role": "assistant", "content": "no", "learnt": False}
    given = (load_template("instructblip_t5"), toy, [1], 100, "k", NO_FRAME)
    assert encode_question([*CHAT, CHAT[2], unlearnt], *given) == encode_question(CHAT, *given)


def test_batches_of_an_encoder_decoder(toy: PreTrainedTokenizerFast) -> None:
    collate = ChatCollator(toy, load_template("blip2_t5"), Squash(8), 2, 64, split_answers=True)
    batch = collate([sample(VQA), sample([VQA[0], CHAT[3]])])
    assert batch["labels"].shape == (2, 3)
    assert batch["labels"][0].tolist()[2] == -100
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    prompts = collate.prompts([sample(VQA[:1])])
    assert prompts["input_ids"][0].tolist() == batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist()


def test_instructions_stand_for_every_square(toy: PreTrainedTokenizerFast) -> None:
    processor = Tiles(4, max_tiles=2)
    collate = ChatCollator(toy, load_template("instructblip"), processor, 2, 200, instructions=Instructions(toy))
    wide = {"images": [np.zeros((4, 8, 3), np.uint8)], "conversation": CHAT, "key": "wide"}
    none = {"images": [], "conversation": [{"role": "user", "content": "hello"}, VQA[1]], "key": "none"}
    batch = collate([wide, none, sample(VQA)])
    squares = len(batch["pixel_values"])
    assert batch["qformer_input_ids"].shape[0] == batch["qformer_attention_mask"].shape[0] == squares == 4
    rows = [
        words(toy, ids[mask == 1].tolist())
        for ids, mask in zip(*(batch[f"qformer_{x}"] for x in ("input_ids", "attention_mask")), strict=True)
    ]
    assert rows[:3] == ["<s>how many apples are there? where is the cat?</s>"] * 3
    assert rows[3] == "<s>how many apples are there?</s>"
    assert {name: len(x) for name, x in collate.blank(2).items() if name.startswith("qformer")} == {
        "qformer_input_ids": 2 * processor.max_tiles, "qformer_attention_mask": 2 * processor.max_tiles
    }  # fmt: skip


def test_a_long_instruction_loses_its_beginning(toy: PreTrainedTokenizerFast) -> None:
    row = Instructions(toy, max_length=6).row(VQA)
    assert words(toy, row) == "<s> apples are there?</s>"
    with pytest.raises(ValueError, match="max_length=2"):
        Instructions(toy, max_length=2)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    letters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog"]
    core = Tokenizer(models.WordPiece({word: i for i, word in enumerate(letters)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    BertTokenizerFast(tokenizer_object=core).save_pretrained(tmp_path)
    return tmp_path


def test_bert_rows_begin_with_cls_or_dec(bert: Path) -> None:
    tokenizer = bert_tokenizer(str(bert))
    assert len(tokenizer) == 9
    assert tokenizer.bos_token_id == 8
    collate = PairCollator(tokenizer, Squash(8), itc_prompt="", caption_prompts={"en": ""})
    pair = {"image": np.zeros((8, 8, 3), np.uint8), "caption": "a cat", "language": "en", "key": "k"}
    batch = collate([pair])
    assert batch["itc_ids"].tolist() == batch["itm_ids"].tolist() == [[2, 5, 6, 3]]
    assert batch["itg_ids"].tolist() == [[8, 5, 6, 3]]
    assert batch["itg_labels"].tolist() == [[-100, 5, 6, 3]]
    assert Instructions(tokenizer).row([{"role": "user", "content": "<image>\na dog"}]) == [2, 5, 7, 3]


def test_a_language_without_a_prompt_of_its_own(toy: PreTrainedTokenizerFast) -> None:
    pair = {"image": np.zeros((8, 8, 3), np.uint8), "caption": "un chat", "language": "fr", "key": "k"}
    collate = PairCollator(toy, Squash(8))
    prompt = collate.prompt_ids("Caption:")
    assert collate([pair])["itg_ids"][0].tolist()[: len(prompt)] == prompt
    collate = PairCollator(toy, Squash(8), caption_prompts={"en": ""})
    with pytest.raises(ValueError, match=r"language 'fr', but for en; \+data\.pairs_collate\.caption_prompts\.fr='A PROMPT'"):
        collate([pair])


def test_a_tokenizer_is_needed() -> None:
    with pytest.raises(ValueError, match="bert-base-uncased"):
        bert_tokenizer(None)


def test_pictures_as_the_library_prepares_them() -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, "BlipImageProcessorPil", None) or transformers.BlipImageProcessor
    picture = np.random.default_rng(0).integers(0, 256, (37, 52, 3), dtype=np.uint8)
    theirs = kind(size={"height": 24, "width": 24})
    expected = torch.as_tensor(np.asarray(theirs(picture, return_tensors="np")["pixel_values"]))
    ours = Squash(24, mean=theirs.image_mean, std=theirs.image_std)
    found = ours.inputs([ours(picture)])["pixel_values"]
    assert torch.allclose(found, expected, atol=1e-5)
