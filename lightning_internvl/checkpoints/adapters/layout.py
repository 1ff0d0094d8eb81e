"""What a layout says of a checkpoint, with the defaults that most share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_internvl.checkpoints.companion import Companion
from lightning_internvl.checkpoints.families.language_model import language_config
from lightning_internvl.checkpoints.name_rules import Config, NameRule, Shapes, match_rules
from lightning_internvl.checkpoints.weight_files import WeightFiles
from lightning_internvl.messages import first_of
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import NextToken
from lightning_internvl.protocols import Decoder, Encoder, Middleware

BESIDE = "from a config.json beside it"
HOLDS_LORA = "this {} checkpoint holds LoRA weights, which must be merged first; {} say so"


class Layout(ABC):
    """How a model lies in files; a module of this folder, or of a package that the user trusts,
    offers an instance as `LAYOUT`.

    Attributes:
        NAME: for people; `layout=` takes `key`.
        MODEL_TYPES: of `config.json`, by which a layout is recognised; a new config says the first.
        ARCHITECTURE: the class that a new config names; None for a layout whose configs name none.
        NATIVE: whether transformers loads the layout by itself.
        SINGLE_FILE: one .pth file instead of a folder with `config.json`.
        DEFAULTS: what a config may leave out.
        LANGUAGE: the field of the language model's config, which a new config has whole; None
            where the layout has none, or has its fields elsewhere.
        BUFFERS: how the names of tensors end that are no weights: tables which older releases
            stored.
    """

    NAME: ClassVar[str]
    MODEL_TYPES: ClassVar[tuple[str, ...]] = ()
    ARCHITECTURE: ClassVar[str | None] = None
    NATIVE: ClassVar[bool] = False
    SINGLE_FILE: ClassVar[bool] = False
    DEFAULTS: ClassVar[Config] = {}
    LANGUAGE: ClassVar[str | None] = None
    BUFFERS: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq", ".position_ids")

    @property
    def key(self) -> str:
        """The name of the layout's module."""
        return type(self).__module__.rpartition(".")[2]

    # --- files to model ---------------------------------------------------------------------------

    def recognises(self, config: Config, shapes: Shapes) -> bool:
        """Whether a `config.json` (empty for a bare file) and the tensors are of this layout."""
        return config.get("model_type") in self.MODEL_TYPES

    def canonical(self, name: str) -> str | None:
        """The name of a tensor in a file as the rules write it; None for what holds no weights."""
        return None if name.endswith(self.BUFFERS) else name

    def completed(self, config: Config, files: WeightFiles) -> Config:
        """The config with what it leaves to the files."""
        return config

    def companions(self, config: Config, shapes: Shapes) -> list[Companion]:
        """The checkpoints that hold parts which these files lack, where the config names some."""
        return []

    def table_rows(self, config: Config, shapes: Shapes) -> dict[str, int]:
        """Rows that tables of words must have which have others in the files; 0 for a table that is
        not used."""
        return {}

    @abstractmethod
    def rules(self, config: Config) -> list[NameRule]:
        """How tensors of the layout become ours and back."""

    @abstractmethod
    def build(self, config: Config, shapes: Shapes) -> VLM:
        """The model of a config, given the tensors in the files under their canonical names.

        Raises:
            ValueError: for a setting that the parts do not have.
        """

    # --- model to files ---------------------------------------------------------------------------

    def config_of(self, model: VLM) -> Config | None:
        """The config that a model was loaded with, brought up to date, else one made from its
        parts; None if the layout cannot hold the model."""
        fields = self.fields_of(model)
        if fields is None:
            return None
        loaded = model.config or {}
        if self.is_config_of(loaded, fields):
            return self.update(loaded, fields)
        return self.new_config(model, fields)

    def fields_of(self, model: VLM) -> Config | None:
        """What the parts of a model say of its config; None if the layout cannot hold the model."""
        return None

    def is_config_of(self, loaded: Config, fields: Config) -> bool:
        """Whether the config that a model was loaded with is one of this layout."""
        return self.recognises(loaded, {})

    def update(self, loaded: Config, fields: Config) -> Config:
        """The config that a model was loaded with, with what its parts say differently by now."""
        return updated_config(loaded, self.DEFAULTS, fields)

    def new_config(self, model: VLM, fields: Config) -> Config:
        """A config for a model that came in another layout."""
        classes = {"architectures": [self.ARCHITECTURE]} if self.ARCHITECTURE else {}
        kind = {"model_type": self.MODEL_TYPES[0]} if self.MODEL_TYPES else {}
        language = {self.LANGUAGE: language_config(model.decoder)} if self.LANGUAGE else {}
        return {**classes, **kind, **fields, **language}

    def official_tensors(self, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under our names (weights, or gradients) as the layout names and shapes them.

        Raises:
            ValueError: for names that the layout has no place for.
        """
        matches, unmatched = match_rules(self.rules(config), tensors)
        if unmatched:
            raise ValueError(f"the layout {self.NAME} has no place for: {first_of(unmatched, 20)}")
        return {name: tensor for match in matches for name, tensor in match.write(tensors).items()}

    def published(self, name: str) -> str:
        """The name under which published files have a tensor, which every reader knows, by its
        canonical one."""
        return name

    def written_tensors(self, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `official_tensors` gives, under the names of published files."""
        official = self.official_tensors(config, tensors)
        return {self.published(name): tensor for name, tensor in official.items()}


class BareFileLayout(Layout):
    """One .pth file without a config: names and shapes tell what it is."""

    SINGLE_FILE = True

    def config_of(self, model: VLM) -> Config | None:
        """An empty config where the layout can hold the model."""
        return {} if self.holds(model) else None

    @abstractmethod
    def holds(self, model: VLM) -> bool:
        """Whether the layout has a place for all parts of a model, with the settings they have."""


class EncoderLayout(Layout):
    """An encoder and nothing else."""

    @abstractmethod
    def encoder(self, config: Config) -> Encoder:
        """The encoder of a config."""

    @abstractmethod
    def encoder_config(self, encoder: nn.Module) -> Config | None:
        """The config of an encoder; None if the layout cannot hold it."""

    def build(self, config: Config, shapes: Shapes) -> VLM:
        return VLM(self.encoder(config))

    def fields_of(self, model: VLM) -> Config | None:
        alone = model.middleware is None and model.decoder is None
        return self.encoder_config(model.encoder) if alone else None


def chat_model(encoder: Encoder, middleware: Middleware, decoder: Decoder | None, **placeholders: Any) -> VLM:
    """A model that answers; `placeholders` of pictures and videos go to `VLM` as they are."""
    return VLM(encoder, middleware, decoder, objectives={"next_token": NextToken()}, **placeholders)


def with_old_prefix(name: str) -> str:
    """A name in a chat model as transformers before 4.52 wrote it, with the parts at the top."""
    old = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.": "",
    }
    for new, prefix in old.items():
        if name.startswith(new):
            return prefix + name.removeprefix(new)
    return name


def updated_config(loaded: Config, defaults: Config, fields: Config) -> Config:
    """A config as it was loaded, with the fields that differ; absent ones are defaults."""
    config = dict(loaded)
    for key, value in fields.items():
        if isinstance(value, dict) and isinstance(loaded.get(key), dict):
            config[key] = updated_config(loaded[key], defaults.get(key, {}), value)
        elif loaded.get(key, defaults.get(key)) != value:
            config[key] = value
    return config
