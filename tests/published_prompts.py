"""What the code or the chat template of published systems writes before an answer, and where that stands.

`OWN` is asked in a conversation without a system message, `GIVEN` with one; "@" stands for a picture. Systems that answer one
question have one here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PICTURE = {"type": "image", "image": "cat.png"}
SYSTEM = "Be brief."


def said(text: str) -> dict[str, str]:
    """A part of a message."""
    return {"type": "text", "text": text}


FIRST: list[dict[str, Any]] = [{"role": "user", "content": [PICTURE, said("What is it?")]}]
OWN = [*FIRST, {"role": "assistant", "content": [said("A cat")]}, {"role": "user", "content": [said("Where?")]}]
GIVEN = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Is <image> there?"}]
MIDDLE = [{"role": "user", "content": [said("Is "), PICTURE, said(" there?")]}]


class Published(NamedTuple):
    """The prompts of one system, and the file that they were read in; `middle`: of templates that take pictures as parts."""

    source: str
    own: str
    given: str | None = None
    middle: str | None = None
    questions: int = 2


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = VICUNA.replace("curious user", "curious human").replace("the user's", "the human's")
INTERNVL_1_5 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
INTERNVL_2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
GPT_OSS = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must be included for every message."
)
DEEPSEEK = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
MINIGPT4 = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
XCOMPOSER = (
    "meta instruction\nYou are an AI assistant whose name is 浦语.\n"
    "- 浦语 is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- 浦语 can understand and communicate fluently in the language chosen by the user such as English and 中文.\nconversation\n"
)
_LING = "InternLM-XComposer (浦语·灵笔)"
XCOMPOSER2 = (
    f"You are an AI assistant whose name is {_LING}.\n- {_LING} is a multi-modality conversational language model that is "
    "developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    f"- {_LING} can understand and communicate fluently in the language chosen by the user such as English and 中文.\n"
    f"- {_LING} is capable of comprehending and articulating responses effectively based on the provided image."
)

CHATML, UNUSED = ("<|im_start|>", "<|im_end|>"), ("[UNUSED_TOKEN_146]", "[UNUSED_TOKEN_145]")


def chatml(system: str, user: str, joint: str = "\n", after: str = "\n", marks: tuple[str, str] = CHATML) -> str:
    """Both questions in ChatML, of which every system here has its own spelling."""
    start, end = marks
    begun = f"{start}system\n{system}{end}{after}" if system else ""
    asked = f"{start}user\n{user}{joint}What is it?{end}{after}{start}assistant\nA cat{end}{after}{start}user\nWhere?{end}{after}"
    return f"{begun}{asked}{start}assistant\n"


def chatml_given(picture: str = "@", after: str = "\n", marks: tuple[str, str] = CHATML) -> str:
    """The question about a picture in its middle in ChatML."""
    start, end = marks
    return f"{start}system\nBe brief.{end}{after}{start}user\nIs {picture} there?{end}{after}{start}assistant\n"


def llama_3(system: str, user: str) -> str:
    """A question in LLaMA 3's format, up to the answer."""
    turns = {"system": system, "user": user, "assistant": None}
    heads = [(f"<|start_header_id|>{role}<|end_header_id|>\n\n", said) for role, said in turns.items() if said != ""]
    return "".join(head + ("" if said is None else f"{said}<|eot_id|>") for head, said in heads)


INTERNVL = "OpenGVLab/InternVL internvl_chat/internvl/conversation.py"
PUBLISHED = {
    "chatml": Published(
        "InternVL3-1B-hf chat_template.json",
        chatml("", "@"),
        chatml_given(),
        "<|im_start|>user\nIs @\n there?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "vicuna": Published(
        "haotian-liu/LLaVA llava/conversation.py (conv_vicuna_v1), llava-1.5-7b-hf chat_template.json for parts",
        f"<s>{VICUNA} USER: @\nWhat is it? ASSISTANT: A cat</s>USER: Where? ASSISTANT:",
        "<s>Be brief. USER: Is @ there? ASSISTANT:",
        f"<s>{VICUNA} USER: @\nIs   there? ASSISTANT:",
    ),
    "llava_v0": Published(
        "haotian-liu/LLaVA llava/conversation.py (conv_llava_v0)",
        f"<s>{HUMAN}###Human: @\nWhat is it?###Assistant: A cat###Human: Where?###Assistant:",
        "<s>Be brief.###Human: Is @ there?###Assistant:",
    ),
    "llava_v1": Published(
        "haotian-liu/LLaVA llava/conversation.py (conv_llava_v1)",
        f"<s>{HUMAN} USER: @\nWhat is it? ASSISTANT: A cat</s>USER: Where? ASSISTANT:",
        "<s>Be brief. USER: Is @ there? ASSISTANT:",
    ),
    "mistral": Published(
        "llava-v1.6-mistral-7b-hf chat_template.json; turns as in LLaVA-VL/LLaVA-NeXT llava/conversation.py",
        "<s>[INST] @\nWhat is it? [/INST] A cat</s>[INST] Where? [/INST]",
        "<s><<SYS>>\nBe brief.\n<</SYS>>\n\n[INST] Is @ there? [/INST]",
        "<s>[INST] @\nIs   there? [/INST]",
    ),
    "llava_llama_3": Published(
        "LLaVA-VL/LLaVA-NeXT llava/conversation.py (conv_llava_llama_3)",
        "<s>" + llama_3(DEEPSEEK, "@\nWhat is it?") + "A cat<|eot_id|>" + llama_3("", "Where?"),
        "<s>" + llama_3("Be brief.", "Is @ there?"),
    ),
    "internvl2_5": Published(INTERNVL, chatml(INTERNVL_2_5, "@"), chatml_given()),
    "internvl2_5_internlm": Published(INTERNVL, "<s>" + chatml(INTERNVL_2_5, "@"), "<s>" + chatml_given()),
    "Hermes-2": Published(INTERNVL, chatml(INTERNVL_1_5, "@", after=""), chatml_given(after="")),
    "internlm2": Published(
        f"{INTERNVL} (internlm2-chat)", "<s>" + chatml(INTERNVL_1_5, "@", after=""), "<s>" + chatml_given(after="")
    ),
    "phi3-chat": Published(
        INTERNVL,
        f"<s><|system|>\n{INTERNVL_1_5}<|end|><|user|>\n@\nWhat is it?<|end|><|assistant|>\nA cat<|end|>"
        "<|user|>\nWhere?<|end|><|assistant|>\n",
        "<s><|system|>\nBe brief.<|end|><|user|>\nIs @ there?<|end|><|assistant|>\n",
    ),
    "internvl_zh": Published(
        INTERNVL,
        "<s> <human>: @\nWhat is it? <bot>: A cat</s><human>: Where? <bot>:",
        "<s>Be brief. <human>: Is @ there? <bot>:",
    ),
    "internvl3_5_gpt_oss": Published(
        "InternVL3_5-GPT-OSS-20B-A4B-Preview conversation.py",
        f"<|start|>system<|message|>{GPT_OSS}<|end|><|start|>user<|message|>@\nWhat is it?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>A cat<|end|><|start|>user<|message|>Where?<|end|><|start|>assistant",
        "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>Is @ there?<|end|><|start|>assistant",
    ),
    "qwen": Published(
        "QwenLM/Qwen-VL finetune.py, Qwen-VL-Chat qwen_generation_utils.py and tokenization_qwen.py (from_list_format)",
        chatml("You are a helpful assistant.", "Picture 1: @"),
        chatml_given("Picture 1: @\n"),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nIs Picture 1: @\n there?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2_vl": Published(
        "Qwen2-VL-2B-Instruct chat_template.json",
        chatml("You are a helpful assistant.", "@", joint=""),
        chatml_given(),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nIs @ there?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen2_5_vl": Published(
        "Qwen2.5-VL-3B-Instruct chat_template.json",
        chatml("You are a helpful assistant.", "@", joint=""),
        chatml_given(),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nIs @ there?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "qwen3_vl": Published(
        "Qwen3-VL-8B-Instruct chat_template.json",
        chatml("", "@", joint=""),
        chatml_given(),
        "<|im_start|>user\nIs @ there?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "deepseek": Published(
        "deepseek-ai/DeepSeek-VL deepseek_vl/utils/conversation.py",
        f"<s>{DEEPSEEK}\n\nUser: @What is it?\n\nAssistant: A cat</s>User: Where?\n\nAssistant:",
        "<s>Be brief.\n\nUser: Is @ there?\n\nAssistant:",
    ),
    "minigpt4": Published(
        "Vision-CAIR/MiniGPT-4 minigpt4_stage2_finetune.yaml (prompt_template, end_sym), conversation.py for the system message",
        f"<s>{MINIGPT4}###Human: <Img>@</Img> What is it? ###Assistant: A cat###Human: Where? ###Assistant: ",
        "<s>Be brief.###Human: Is <Img>@</Img> there? ###Assistant: ",
    ),
    "minigpt4_llama2": Published(
        "Vision-CAIR/MiniGPT-4 conversation.py (CONV_VISION_LLama2); end_sym ends an answer",
        f"{MINIGPT4}<s>[INST] <Img>@</Img> What is it? [/INST] A cat</s><s>[INST] Where? [/INST] ",
        "Be brief.<s>[INST] Is <Img>@</Img> there? [/INST] ",
    ),
    "blip2": Published("LAVIS blip2_opt.py, VQA prompt", "@</s>Question: What is it? Short answer:", questions=1),
    "blip2_t5": Published("LAVIS blip2_t5.py, VQA prompt", "@Question: What is it? Short answer:</s>", questions=1),
    "instructblip": Published("LAVIS blip2_vicuna_instruct.py", "@</s>What is it?", questions=1),
    "instructblip_t5": Published("LAVIS blip2_t5_instruct.py", "@What is it?</s>", questions=1),
    "xcomposer": Published(
        "internlm-xcomposer-vl-7b modeling_InternLM_XComposer.py (wrap_prompt, align_text)",
        f"<s>{XCOMPOSER} <|User|>:@What is it?\n<TOKENS_UNUSED_0> <|Bot|>:A cat<TOKENS_UNUSED_1>"
        " <|User|>:Where?\n<TOKENS_UNUSED_0> <|Bot|>:",
    ),
    "xcomposer2": Published(
        "internlm-xcomposer2-vl-7b modeling_internlm_xcomposer2.py (build_inputs)",
        "<s>" + chatml(XCOMPOSER2, "@", joint="", marks=UNUSED),
        "<s>" + chatml_given(marks=UNUSED),
    ),
    "flamingo": Published("OpenFlamingo train/data.py", "@What is it?A cat<|endofchunk|>Where?"),
    "flamingo_vqa": Published(
        "OpenFlamingo eval/models/open_flamingo.py (get_vqa_prompt)",
        "@Question:What is it? Short answer:A cat<|endofchunk|>Question:Where? Short answer:",
    ),
}
