"""How published systems read pictures and text, by the name of their layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_internvl.checkpoints.adapters import own_layouts
from lightning_internvl.checkpoints.families.open_flamingo import ADDED
from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.data.processors.any_resolution import AnyResolution
from lightning_internvl.data.processors.basic import CLIP_MEAN, CLIP_STD, CenterCrop, Processor, Squash, Tiles
from lightning_internvl.data.processors.best_grid import BestGrid
from lightning_internvl.data.processors.padded import HALF, PaddedPair, PaddedSquare, PadSquare
from lightning_internvl.data.processors.pixels import IMAGENET_MEAN, IMAGENET_STD
from lightning_internvl.data.templates import template_names
from lightning_internvl.decoders.hf_seq2seq import HFSeq2SeqLM
from lightning_internvl.files import read_json
from lightning_internvl.model.vlm import VLM

CLIP, IMAGENET, HALVES = (CLIP_MEAN, CLIP_STD), (IMAGENET_MEAN, IMAGENET_STD), (HALF, HALF)
HANDOFF = "handoff"  # an exported folder of this project's own layout
PROCESSORS: Mapping[str, type[Processor]] = {
    "squash": Squash, "center_crop": CenterCrop, "pad_square": PadSquare, "tiles": Tiles,
    "padded": PaddedSquare, "padded_pair": PaddedPair, "any_resolution": AnyResolution, "best_grid": BestGrid,
}  # fmt: skip


class Lacking(ValueError):
    """Something that a folder does not say, and the setting of `open_model` that does."""

    def __init__(self, what: str, setting: str, value: str) -> None:
        super().__init__(f"{what}; give {setting}={value}")
        self.what, self.setting, self.value = what, setting, value


class System(NamedTuple):
    """How a published system reads.

    `frame` are the special tokens around a picture, () where no chat format has any, `added` those that the system adds to the
    tokenizer of a language model that its files only name, that of a picture last. A name of `template` or `processor` may
    be found by a function of `config.json` and the model; without a template the folder must say
    its own. `video_frames` are the least and the most frames of a video that are read as pictures.
    """

    template: str | Callable[[Config, VLM], str] = ""
    processor: str | Callable[[Config, VLM], str] = "squash"
    statistics: tuple[Any, Any] = CLIP
    system: str | None = None
    frame: tuple[str, str] | tuple[()] | None = None
    added: tuple[str, ...] = ()
    video_frames: tuple[int, int] | None = None


def _internvl_template(config: Config, model: VLM) -> str:
    """The name in `config.json`, else by the language model."""
    named, language = config.get("template"), str(config.get("llm_config", {}).get("model_type"))
    if not named:
        return {"llama": "vicuna", "internlm2": "internlm2"}.get(language, "chatml")
    found = {"vicuna_v1.1": "vicuna", "internlm2-chat": "internlm2"}.get(named, named)
    if found not in template_names():
        fault = f"config.json names the chat format {named!r}, which is not known here"
        raise Lacking(fault, "template", "NAME")
    return "internvl2_5_internlm" if found == "internvl2_5" and language.startswith("internlm") else found


def _internvl_native_template(config: Config, model: VLM) -> str:
    """The format of the same model as released."""
    language = str(config.get("text_config", {}).get("model_type"))
    return {"internlm3": "internvl2_5_internlm", "gpt_oss": "internvl3_5_gpt_oss"}.get(language, "chatml")


def _t5(name: str) -> Callable[[Config, VLM], str]:
    return lambda config, model: f"{name}_t5" if isinstance(model.decoder, HFSeq2SeqLM) else name


def _llava_template(config: Config, model: VLM) -> str:
    return "llava_v1" if config.get("mm_projector_type", "linear") == "linear" else "vicuna"


def _llava_next_template(config: Config, model: VLM) -> str:
    """By the language model; LLaMA 3 has the larger vocabulary."""
    language = config.get("text_config") or {}
    if language.get("model_type", "llama") == "llama":
        return "llava_llama_3" if language.get("vocab_size", 0) > 100_000 else "vicuna"
    return "mistral" if language["model_type"] == "mistral" else "qwen2"


def _llava_processor(config: Config, model: VLM) -> str:
    return "pad_square" if config.get("image_aspect_ratio") == "pad" else "center_crop"


def _minigpt4_template(config: Config, model: VLM) -> str:
    return "minigpt4" if config.get("has_qformer", True) else "minigpt4_llama2"


def _padded(config: Config, model: VLM) -> str:
    return "padded_pair" if hasattr(model.encoder, "high") else "padded"


_IMG = ("<img>", "</img>")
# What the classes of transformers do, where a folder names one: by its name without
# "ImageProcessor" and what follows.
_CLASSES: Mapping[str, Callable[[Config], str]] = {
    "GotOcr2": lambda found: "tiles",
    "Qwen2VL": lambda found: "any_resolution",
    "LlavaNext": lambda found: "best_grid",
    "LlavaOnevision": lambda found: "best_grid",
    "DeepseekVL": lambda found: "padded",
    "DeepseekVLHybrid": lambda found: "padded_pair",
    "Llava": lambda found: "pad_square" if found.get("do_pad") else "center_crop",
    "CLIP": lambda found: "center_crop" if found.get("do_center_crop", True) else "squash",
    "Blip": lambda found: "squash",
    "Siglip": lambda found: "squash",
}
SYSTEMS: Mapping[str, System] = {
    HANDOFF: System(statistics=IMAGENET),
    "internvl_native": System(_internvl_native_template, "tiles", IMAGENET, frame=_IMG, video_frames=(8, 32)),
    "internvl_chat": System(_internvl_template, "tiles", IMAGENET, frame=_IMG, video_frames=(8, 32)),
    "internvl_chat_llava": System("vicuna", _llava_processor, IMAGENET),
    "llava": System(_llava_template, _llava_processor),
    "llava_next": System(_llava_next_template, "best_grid", frame=()),
    "llava_onevision": System("qwen2", "best_grid", HALVES, system="", frame=()),
    "llava_native": System("vicuna", "center_crop", system=""),
    "qwen2_vl": System("qwen2_vl", "any_resolution", frame=("<|vision_start|>", "<|vision_end|>")),
    "qwen2_5_vl": System("qwen2_5_vl", "any_resolution", frame=("<|vision_start|>", "<|vision_end|>")),
    "qwen3_vl": System("qwen3_vl", "any_resolution", HALVES, frame=("<|vision_start|>", "<|vision_end|>")),
    "qwen3_vl_moe": System("qwen3_vl", "any_resolution", HALVES, frame=("<|vision_start|>", "<|vision_end|>")),
    "qwen_vl": System("qwen", frame=_IMG),
    "blip2_hf": System(_t5("blip2")),
    "instructblip_hf": System(_t5("instructblip")),
    "deepseek_vl": System("deepseek", _padded, HALVES),
    "deepseek_vl_hf": System("deepseek", _padded, HALVES),
    "minigpt4": System(_minigpt4_template),
    "xcomposer1": System("xcomposer"),
    "xcomposer2": System("xcomposer2"),
    "open_flamingo": System("flamingo", "center_crop", added=ADDED),
    "internvl_14b": System(statistics=IMAGENET),
    "internvl_c": System(statistics=IMAGENET),
    "clip": System(processor="center_crop"),
    "clip_openai": System(processor="center_crop"),
    "clip_resnet": System(processor="center_crop"),
    "siglip": System(statistics=HALVES),
    "blip2_itm_hf": System(),
    "blip2_lavis": System(),
}


def system_of(layout: str, config: Config) -> System | None:
    """How a layout reads, with what its `config.json` says of it: one of the user's own as its
    folder says; None if it neither answers nor compares."""
    known = SYSTEMS.get(layout, System() if layout in own_layouts() else None)
    if layout == "internvl_chat" and isinstance(config.get("system_message"), str):
        return known and known._replace(system=config["system_message"])
    if layout == "internvl_native" and config.get("text_config", {}).get("model_type") == "internlm3":
        return known and known._replace(system="")  # folders of transformers' layout say none
    if layout == "llava" and config.get("mm_use_im_start_end"):
        return known and known._replace(frame=("<im_start>", "<im_end>"))
    return known


def picture_fields(folder: Path) -> Config:
    """What a folder says of the preparation of pictures."""
    folder = folder if folder.is_dir() else folder.parent
    nested = read_json(folder / "processor_config.json", {}).get("image_processor") or {}
    return read_json(folder / "preprocessor_config.json", {}) | nested


def processor_name(known: System, found: Config, config: Config, model: VLM, *, by_class: bool) -> str:
    """The name in `PROCESSORS`: by the class that the folder names, where transformers prepares
    pictures of this layout, else the published one."""
    kind = str(found.get("image_processor_type", "")).partition("ImageProcessor")[0]
    return _CLASSES[kind](found) if by_class and kind in _CLASSES else named(known.processor, config, model)


def named(name: str | Callable[[Config, VLM], str], config: Config, model: VLM) -> str:
    """A name of the table, found out where it depends on the checkpoint."""
    return name if isinstance(name, str) else name(config, model)


def make_processor(name: str, model: VLM, found: Config, config: Config, statistics: tuple[Any, Any]) -> Processor:
    """How pictures are prepared: the folder's fields over the published numbers."""
    settings = processor_settings(name, model, found, config, statistics)
    return PROCESSORS[name](**{key: value for key, value in settings.items() if key != "_target_"})


def processor_settings(name: str, model: VLM, found: Config, config: Config, statistics: tuple[Any, Any]) -> Config:
    """The configuration of that processor."""
    mean, std = found.get("image_mean", statistics[0]), found.get("image_std", statistics[1])
    options: Config = {"image_size": model.encoder.image_size, "mean": mean, "std": std}
    size = found.get("size") or {}
    if name == "tiles":  # the fields of the release, then those of transformers
        dynamic = config.get("dynamic_image_size", True)
        most = config.get("max_dynamic_patch", found.get("max_patches", 12)) if dynamic else 1
        least = config.get("min_dynamic_patch", found.get("min_patches", 1)) if dynamic else 1
        options |= {"min_tiles": least, "max_tiles": most, "thumbnail": config.get("use_thumbnail", True)}
    elif name == "any_resolution":
        options |= {"patch_size": model.encoder.patch_size, "merge_size": model.encoder.merge_size}
        least = found.get("min_pixels") or size.get("shortest_edge", 56 * 56)
        options |= {"frames": model.encoder.frames, "min_pixels": least}
        options["max_pixels"] = found.get("max_pixels") or size.get("longest_edge")
        block = (model.encoder.patch_size * model.encoder.merge_size) ** 2
        options["frame_pixels"] = (128 * block, 768 * block)
    elif name == "best_grid":
        side, own = model.encoder.image_size, model.middleware
        points = found.get("image_grid_pinpoints")
        options["grids"] = [[length // side for length in one] for one in points] if points else [list(one) for one in own.grids]
        options |= {"map_squares": own.map_squares, "frame_pool": own.frame_pool, "alone_with_others": own.frame_pool is not None}
    elif name in ("padded", "padded_pair"):
        options |= {"min_side": found.get("min_size", 14), "nearest": "image_processor_type" in found}
        if name == "padded_pair":
            options["high_image_size"] = model.encoder.high_image_size
            options["high_mean"] = found.get("high_res_image_mean", CLIP_MEAN)
            options["high_std"] = found.get("high_res_image_std", CLIP_STD)
            resample = found.get("resample", 3 if options["nearest"] else 2)
            options["low_filter"] = "bilinear" if resample == 2 else "bicubic"
    maker = PROCESSORS[name]
    return {"_target_": f"{maker.__module__}.{maker.__qualname__}", **options}
