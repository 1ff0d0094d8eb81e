"""An exported folder as two GGUF files of llama.cpp: the language model, and its tower with the
projector, made one tensor after another and read back."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_internvl.checkpoints.name_rules import Config
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.export.gguf_fields import misread, text_part, tower_blocks, write_language_fields, write_vision_fields
from lightning_internvl.export.gguf_tensors import LANGUAGES, GGUFTensor, language_tensors, type_of, vision_tensors
from lightning_internvl.export.gguf_words import write_words
from lightning_internvl.export.report import ExportOptions
from lightning_internvl.files import atomic_file, read_json

USUAL = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def projector_file(to: Path) -> Path:
    """Where llama.cpp's tools look for the tower beside a language model."""
    return to.with_name(f"mmproj-{to.name}")


def write_gguf(folder: Path, to: Path, options: ExportOptions) -> tuple[list[str], list[str]]:
    """Write both files of a checked folder, read them back, and let them appear.

    Returns:
        a line for each file, and what llama.cpp does otherwise
    """
    logging.getLogger("gguf").setLevel(logging.ERROR)  # which tells each step of writing
    config, pictures = read_json(folder / "config.json"), read_json(folder / "preprocessor_config.json", {})
    with TensorReader(folder) as reader, atomic_file(to) as text, atomic_file(projector_file(to)) as tower:
        notes = _write_language(text, folder, config, reader, options)
        _write_tower(tower, folder, config, pictures, reader, options)
        lines = []
        for file, place, tensors in ((text, to, _of_language), (tower, projector_file(to), _of_tower)):
            count = check_file(file, tensors(config, reader), reader, USUAL[options.dtype])
            lines.append(f"{place}: {count} tensors read back equal")
    return lines, [*notes, *misread(config, pictures)]


class TensorReader:
    """Tensors of a folder of safetensors by their names, one at a time."""

    def __init__(self, folder: Path) -> None:
        files = WeightFiles(folder)
        self.shapes, self._stack = files.shapes, ExitStack()
        self._places = {name: file for file in files.files for name in WeightFiles(file).shapes}
        self._opened: dict[Path, Any] = {}

    def __enter__(self) -> TensorReader:
        for file in set(self._places.values()):
            self._opened[file] = self._stack.enter_context(safe_open(file, framework="pt"))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def made(self, tensor: GGUFTensor) -> Tensor:
        """What a file holds, as numbers of the folder's type."""
        parts = [self._opened[self._places[name]].get_tensor(name) for name in tensor.sources]
        return tensor.change(*parts).contiguous()

    def shape(self, tensor: GGUFTensor) -> tuple[int, ...]:
        """Its shape, without reading it."""
        return tuple(tensor.change(*(torch.empty(self.shapes[name], device="meta") for name in tensor.sources)).shape)


def _of_language(config: Config, reader: TensorReader) -> list[GGUFTensor]:
    return list(language_tensors(text_part(config), reader.shapes))


def _of_tower(config: Config, reader: TensorReader) -> list[GGUFTensor]:
    return list(vision_tensors(config, list(reader.shapes), tower_blocks(config)))


def _write_language(file: Path, folder: Path, config: Config, reader: TensorReader, options: ExportOptions) -> list[str]:
    import gguf

    text, notes = text_part(config), []

    def fields(writer: Any) -> None:
        rows = next(info.shape[0] for name, info in writer.tensors[0].items() if name == "token_embd.weight")
        writer.add_type(gguf.GGUFType.MODEL)
        write_language_fields(writer, text, rows)
        notes.extend(write_words(writer, folder, rows))

    tensors = _of_language(config, reader)
    _write(file, LANGUAGES[text["architectures"][0]], folder.name, tensors, reader, options, fields)
    return notes


def _write_tower(
    file: Path,
    folder: Path,
    config: Config,
    pictures: Mapping[str, Any],
    reader: TensorReader,
    options: ExportOptions,
) -> None:
    import gguf

    def fields(writer: Any) -> None:
        writer.add_type(gguf.GGUFType.MMPROJ)
        write_vision_fields(writer, config, pictures)

    _write(file, "clip", folder.name, _of_tower(config, reader), reader, options, fields)


def _write(
    file: Path,
    architecture: str,
    name: str,
    tensors: Iterable[GGUFTensor],
    reader: TensorReader,
    options: ExportOptions,
    fields: Any,
) -> None:
    """A file: what there is, the metadata, then tensor by tensor."""
    import gguf

    usual, made = USUAL[options.dtype], list(tensors)
    writer = gguf.GGUFWriter(None, architecture)
    for tensor in made:
        shape = reader.shape(tensor)
        kind = gguf.GGMLQuantizationType[type_of(tensor, len(shape), usual)]
        width = 4 if kind is gguf.GGMLQuantizationType.F32 else 2
        writer.add_tensor_info(tensor.name, shape, np.dtype(f"f{width}"), int(np.prod(shape)) * width, raw_dtype=kind)
    writer.add_name(name)
    if options.licence:
        writer.add_license(options.licence)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(gguf.LlamaFileType[{"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}[usual]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    fields(writer)
    writer.write_header_to_file(path=file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in made:
        numbers = reader.made(tensor)
        writer.write_tensor_data(_bytes(numbers, type_of(tensor, numbers.ndim, usual)))
    writer.close()


def _bytes(numbers: Tensor, kind: str) -> np.ndarray:
    """Numbers as they lie in a file."""
    if kind == "BF16":  # which numpy does not have
        return numbers.bfloat16().view(torch.int16).numpy()
    return numbers.to(torch.float16 if kind == "F16" else torch.float32).numpy()


def check_file(file: Path, tensors: Iterable[GGUFTensor], reader: TensorReader, usual: str) -> int:
    """See that a file holds these tensors and no other, each with its values.

    Raises:
        ValueError: naming the tensor.
    """
    from gguf import GGUFReader

    held = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    wanted = {tensor.name: tensor for tensor in tensors}
    if held.keys() != wanted.keys():
        raise ValueError(f"the export failed its check: GGUF tensors {sorted(held.keys() ^ wanted.keys())[:20]} differ")
    for name, tensor in wanted.items():
        numbers = reader.made(tensor)
        kind = type_of(tensor, numbers.ndim, usual)
        found = held[name]
        same_shape = [int(size) for size in reversed(found.shape)] == list(numbers.shape)
        raw = np.ascontiguousarray(found.data).view(np.uint8).ravel()
        same = found.tensor_type.name == kind and same_shape
        if not same or not np.array_equal(raw, np.ascontiguousarray(_bytes(numbers, kind)).view(np.uint8).ravel()):
            raise ValueError(f"the export failed its check: the GGUF tensor {name} is read back otherwise")
    return len(wanted)
