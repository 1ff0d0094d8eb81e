"""A model in an official layout, built from its configuration and its tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from lightning_internvl.checkpoints.adapter_folder import AdapterFolder, Update, WholeTensors, is_adapter_folder
from lightning_internvl.checkpoints.adapters import layout_of_checkpoint
from lightning_internvl.checkpoints.adapters.layout import Layout
from lightning_internvl.checkpoints.companion import Companion
from lightning_internvl.checkpoints.name_rules import Config, RuleMatch, match_rules
from lightning_internvl.checkpoints.odd_files import FLOATS, quantiser
from lightning_internvl.checkpoints.tied_tables import FIELD, TableRows, has_tables, said_to_be_tied, table_names
from lightning_internvl.checkpoints.weight_files import Shape, WeightFiles, read_config
from lightning_internvl.config.consent import Untrusted, given_parts
from lightning_internvl.decoders.hf_causal import HFCausalLM
from lightning_internvl.files import read_json
from lightning_internvl.layers.config_values import fields_told
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.messages import first_of
from lightning_internvl.model.vlm import VLM


class OfficialCheckpoint:
    """A folder or file in an official layout.

    Attributes:
        names: canonical names by those in the files, without what holds no weights.
        shapes: of the tensors, by canonical name.
        places: folders or hub ids of the parts that the files lack.

    Raises:
        ValueError: if no layout is known for it.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.adapters = place, AdapterFolder(place) if is_adapter_folder(place) else None
        base = self.adapters.base if self.adapters else place
        self.config, self.files = _opened(place, base)
        self.layout = layout_of_checkpoint(self.config, self.files.shapes)
        with fields_told(place):
            self._read_names()

    def _read_names(self) -> None:
        self._leave_parts_aside()
        self.config = self.layout.completed(self.config, self.files)
        canonical = {name: self.layout.canonical(name) for name in self.files.shapes}
        self.names = {there: name for there, name in canonical.items() if name is not None}
        self.shapes = {name: self.files.shapes[there] for there, name in self.names.items()}
        self.sources: list[tuple[WeightFiles | WholeTensors, dict[str, str]]] = [(self.files, self.names)]
        self.updates: dict[str, Update | TableRows] = {}
        self.places: dict[str, str] = {}
        if self.adapters:
            self._put_on(self.adapters)
        self._complete()

    def _complete(self) -> None:
        """Take parts that the files lack from the checkpoints that hold them.

        Raises:
            ValueError: for a part that the user gives and the files hold, and for files of weights
                that belong to nothing.
        """
        companions = {one.part: one for one in self.layout.companions(self.config, self.shapes)}
        if needless := given_parts().keys() - companions.keys():
            part = min(needless)
            fault = f"{part}.pretrained={given_parts()[part]} has no effect"
            raise ValueError(f"{fault}: {self.place} ({self.layout.NAME}) holds its {part}; leave it out")
        used = [*self.files.files]
        for one, (place, theirs, files) in _opened_companions(companions.values(), self.place, self.files.files):
            self.config, names = one.join(self.config, theirs, files), one.names(files.shapes)
            self.sources.append((files, names))
            self.shapes |= {name: files.shapes[there] for there, name in names.items()}
            self.places[one.part] = place
            used += files.files
        for name, rows in self.layout.table_rows(self.config, self.shapes).items():
            width = self.shapes.pop(name)[1:]
            if rows:
                self.shapes[name], self.updates[name] = (rows, *width), TableRows(rows)
        if left := [file.name for rival in self.files.rivals for file in rival if file not in used]:
            here = first_of([file.name for file in self.files.files], 3)
            advice = "keep one of them there"
            raise ValueError(f"{self.place} holds the weights of two models, {here} and {first_of(left, 3)}; {advice}")

    def _leave_parts_aside(self) -> None:
        """Take another set of the folder's files for the model where the first is a part that the
        model lacks, as CLIP's `model.safetensors` in a folder of pickles."""
        sets = [self.files.files, *self.files.rivals]
        for files in sets[1:]:
            wanted = self.layout.companions(self.config, self.files.shapes)
            if not any(one.names(self.files.shapes) for one in wanted):
                return
            self.files = WeightFiles(files)
            self.files.rivals = [one for one in sets if one is not files]

    def _put_on(self, adapters: AdapterFolder) -> None:
        """Let tensors that were trained whole take the place of the base's, and remember the updates
        of others until these are read.

        Raises:
            ValueError: for updates that do not fit the base.
        """
        updates, tensors = adapters.read()
        whole = WholeTensors(tensors)
        canonical = {name: self.layout.canonical(name) for name in whole.shapes}
        names = {there: name for there, name in canonical.items() if name is not None}
        self.names = {there: name for there, name in self.names.items() if name not in names.values()}
        self.sources = [(self.files, self.names), (whole, names)]
        self.shapes |= {name: whole.shapes[there] for there, name in names.items()}
        put_on = {str(self.layout.canonical(name)): update for name, update in updates.items()}
        self.updates |= put_on
        for name, update in put_on.items():
            if (there := self.shapes.get(name)) != update.shape:
                fault = f"{name} is {there or 'missing'} there, and the adapter is for {update.shape}"
                advice = "base_model_name_or_path must be the model that they were trained on"
                raise ValueError(f"the adapters in {self.place} do not fit their base {adapters.base}: {fault}; {advice}")

    def build(self) -> VLM:
        """The model, with fresh weights.

        Raises:
            ValueError: for a config that the layout cannot be built from.
        """
        try:
            with fields_told(self.place):
                model = self.layout.build(self.config, self.shapes)
        except ValueError as error:
            raise ValueError(f"{self.place} is no {self.layout.NAME} that is known here: {error}") from error
        if has_tables(model.decoder):
            self._settle_tables(model)
        if model.decoder is not None and model.image_token_id is None:
            base = self.adapters.base if self.adapters else self.place
            model.image_token_id = image_token_id(self.place) or image_token_id(base)
        return model

    def _settle_tables(self, model: VLM) -> None:
        """The tables of words are one where config or files say so: a table that is missing is not
        taken for a tied one, and two equal ones that the config ties become one, as in
        transformers; two different ones stay two.

        Raises:
            ValueError: if the output's table is missing and the config does not tie it.
        """
        decoder: Any = model.decoder
        tied = said_to_be_tied(self.config, decoder)
        matches = [match_rules(self.layout.rules(self.config), [name])[0] for name in table_names(model, decoder)]
        if tied == decoder.tied or not all(matches):
            return
        table, head = (match[0].official[0] for match in matches)
        if not tied and table not in self.shapes:
            return  # more than the output's table is missing, and is listed with it
        if not tied:
            fault = f"1 missing: {head}, and the config does not say that it is tied to {table} ({FIELD})"
            raise ValueError(f"the weights in {self.place} do not fit {self.layout.NAME}:\n  {fault}")
        if isinstance(decoder, HFCausalLM) and self._equal(table, head):
            decoder.lm.config.tie_word_embeddings = True
            decoder.tie()
            self.names.pop(next(there for there, name in self.names.items() if name == head))
            del self.shapes[head]

    def _equal(self, *names: str) -> bool:
        there = [key for key, name in self.names.items() if name in names]
        if len(there) != len(names) or len({self.shapes[name] for name in names}) != 1:
            return False
        first, second = dict(self.files.tensors(torch.device("cpu"), only=there)).values()
        return torch.equal(first, second)

    def load_into(self, model: VLM, device: torch.device, dtype: torch.dtype | None) -> None:
        """Read the tensors one by one and give the model those that are complete.

        Raises:
            ValueError: if tensors are missing, unexpected or of another shape; nothing is read
                then.
        """
        matches = self.check(model)
        waiting: dict[tuple[str, ...], dict[str, Tensor]] = {}
        for files, names in self.sources:
            for there, tensor in files.tensors(device, dtype):
                name = names.get(there)
                if name is None or name not in matches:
                    continue
                if name in self.updates:
                    tensor = self.updates[name].added_to(tensor)
                match = matches[name]
                parts = waiting.setdefault(match.official, {})
                parts[name] = tensor
                if len(parts) == len(match.official):
                    _assign(model, match.read(waiting.pop(match.official)))

    def _check_types(self) -> None:
        """Weights must be numbers with a point in 16 bits or more; what a tool has quantised needs
        that tool.

        Raises:
            ValueError: naming the types, and the method where the config says it.
        """
        odd = [(name, files.types[name]) for files, names in self.sources for name in names if files.types[name] not in FLOATS]
        if odd:
            method = quantiser(self.config)
            how = f"weights that {method} has quantised" if method else "quantised weights"
            listed = first_of([f"{name} is {kind}" for name, kind in odd], 3)
            raise ValueError(f"{self.place} holds {how} ({listed}); take the model's release in bfloat16 or float16")

    def check(self, model: VLM) -> dict[str, RuleMatch]:
        """The rule of every official tensor, after all names and shapes have been found right."""
        wanted = {name: tensor.to("meta") for name, tensor in own_tensors(model).items()}
        with fields_told(self.place):
            rules = self.layout.rules(self.config)
        matches, unmatched = match_rules(rules, wanted)
        if unmatched:
            raise ValueError(f"the layout {self.layout.NAME} has no place for: {first_of(unmatched, 20)}")
        expected: dict[str, Shape] = {}
        for match in matches:
            expected |= {name: tuple(tensor.shape) for name, tensor in match.write(wanted).items()}
        self._check_types()
        if problems := shape_problems(self.shapes, expected):
            raise ValueError(f"the weights in {self.place} do not fit {self.layout.NAME}:\n{problems}")
        return {name: match for match in matches for name in match.official}


def _opened_companions(
    wanted: Iterable[Companion], place: Path, taken: Collection[Path]
) -> list[tuple[Companion, tuple[str, Config, WeightFiles]]]:
    """Companions with what `open` gives for them.

    Raises:
        ValueError: as `Companion.open`; of several that are not found all are told.
    """
    found, faults = [], []
    for one in wanted:
        try:
            found.append((one, one.open(place, taken)))
        except ValueError as error:
            faults.append(error)
    if len(faults) > 1:
        lines = [str(error) for error in faults]
        raise Untrusted(lines) if any(isinstance(error, Untrusted) for error in faults) else ValueError("\n".join(lines))
    if faults:
        raise faults[0]
    return found


def shape_problems(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Tensors that are missing, unexpected or of another shape, a line for each kind."""
    missing = sorted(f"{name} {shape}" for name, shape in expected.items() if name not in found)
    unexpected = [f"{name} {shape}" for name, shape in found.items() if name not in expected]
    misshapen = []
    for name, shape in expected.items():
        # A number may lack its dimension.
        if name in found and (found[name] or (1,)) != (shape or (1,)):
            misshapen.append(f"{name} is {found[name]}, the config says {shape}")
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    lines = [f"  {len(names)} {kind}: {first_of(names, 20)}" for kind, names in kinds.items() if names]
    return "\n".join(lines)


def _opened(place: Path, base: Path) -> tuple[Config, WeightFiles]:
    """The config of a folder or file, or of its base, and the base's tensors."""
    return read_config(place if (place / "config.json").is_file() else base), WeightFiles(base)


def recognised(place: Path) -> tuple[Layout, Config]:
    """The layout of a folder or file and its `config.json`; of adapters that of their base. Names
    of tensors are read, and no tensor.

    Raises:
        ValueError: if no layout is known for it.
    """
    config, files = _opened(place, AdapterFolder(place).base if is_adapter_folder(place) else place)
    return layout_of_checkpoint(config, files.shapes), config


def language_model_place(place: Path) -> str | None:
    """The folder or hub id of a language model that a checkpoint only names, or of the base of
    adapters; None for a checkpoint that holds its language model.

    Raises:
        ValueError: if it is not found, or if no layout is known for the checkpoint.
    """
    checkpoint = OfficialCheckpoint(place)
    base = str(checkpoint.adapters.base) if checkpoint.adapters else None
    return checkpoint.places.get("decoder") or base


def meta_model(place: Path) -> VLM:
    """The model of an official folder without its weights, on the meta device.

    Raises:
        ValueError: if no layout is known for it.
    """
    checkpoint = OfficialCheckpoint(place)
    with torch.device("meta"):
        return checkpoint.build()


def official_model(place: Path, dtype: torch.dtype | None, device: torch.device) -> VLM:
    """The model of an official folder or file, with its weights.

    Args:
        dtype: type of all floating-point parameters; None keeps the types of the file.

    Raises:
        ValueError: if no layout is known for it, or if tensors are missing, unexpected or of
            another shape.
    """
    checkpoint = OfficialCheckpoint(place)
    with init_empty_weights(include_buffers=False):
        model = checkpoint.build()
    _tie(model)
    checkpoint.load_into(model, device, dtype)
    _tie(model)
    model.config = checkpoint.config
    return model.to(device)  # buffers, which no file holds


def image_token_id(folder: Path, token: str = "<IMG_CONTEXT>") -> int | None:
    """Id of the placeholder in the tokenizer files of a folder, for layouts whose config does not
    tell it; None without them."""
    added = read_json(folder / "added_tokens.json", {})
    if token in added:
        return added[token]
    entries = read_json(folder / "tokenizer_config.json", {}).get("added_tokens_decoder", {})
    found = {entry["content"]: int(number) for number, entry in entries.items()}
    listed = read_json(folder / "tokenizer.json", {}).get("added_tokens", [])
    found |= {entry["content"]: entry["id"] for entry in listed}
    return found.get(token)


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors in the place of parameters and buffers of the meta device."""
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        placed = getattr(model.get_submodule(owner), leaf)
        if isinstance(placed, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=placed.requires_grad)
        setattr(model.get_submodule(owner), leaf, tensor)


def _tie(model: VLM) -> None:
    """Let tensors that stand in several places be one again after one of the places was filled."""
    if model.decoder is not None:
        model.decoder.tie()
