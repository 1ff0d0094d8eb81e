"""Any vision tower of transformers as the encoder: CLIP, SigLIP and SigLIP 2, DINOv2, DINOv3, I-JEPA
and others that give states of patches. Its parameters keep their Hugging Face names below `tower.`.

Letters: N images, P tokens, D width, S side in pixels, G patches to a side.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from lightning_internvl.encoders.tower import Tower
from lightning_internvl.hub import check_no_kernels, load_weights, model_source, plain_config, quiet
from lightning_internvl.layers.attention import requested_backend
from lightning_internvl.layers.hf_attention import use_ours
from lightning_internvl.layers.hf_config import make_config

TESTED = "clip_vision_model, siglip_vision_model, siglip2_vision_model, dinov2, dinov2_with_registers, dinov3_vit, ijepa, vit"
INTERPOLATE = "interpolate_pos_encoding"  # of a forward pass with pictures of another size


class HFVision(Tower):
    """Pixels to visual tokens.

    What stands for the whole picture comes first in the last layer: the class token as the tower
    pools it, or the vector of its pooling head. Then other tokens that are no patches, then the
    patches, row by row.

    Args:
        pretrained: a hub id or a local folder, of the tower or of a model that has one (CLIP); its
            weights are loaded. None builds from `config` with random weights.
        config: fields of the tower's configuration, `model_type` among them where nothing is
            loaded.
        image_size: side in pixels of the pictures that are expected; None: that of the
            configuration. Positions are interpolated where it is another one.
        pool: whether a pooling head that reads the patches (SigLIP) gives the first token; without
            one the patches stand alone. A class token stays where it is.

    Attributes:
        special_tokens: tokens before the patches, in every layer.

    On the meta device no weights are loaded, and nothing at all is read where `config` has a
    `model_type`.

    Raises:
        ValueError: without `pretrained` and `config`; if it cannot be loaded, or is no tower that
            gives states of patches.
    """

    roles: ClassVar = {"patch_embedding": ("*.patch_embed*",)}

    def __init__(
        self,
        *,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        image_size: int | None = None,
        pool: bool = True,
    ) -> None:
        super().__init__()
        check_no_kernels(config or {}, "encoder.config")
        if pretrained is None and "model_type" not in (config or {}):
            raise ValueError(
                f"encoder.pretrained=FOLDER_OR_ID is needed, or null and an encoder.config with a model_type (tested: {TESTED})"
            )
        self.pretrained, self.tower = pretrained, self._made(pretrained, config or {})
        known = self.tower.config
        self.dim, self.patch_size, self.stored_size = known.hidden_size, known.patch_size, side_of(known)
        self.image_size = image_size or self.stored_size
        self.depth = len(self.sharding_units())
        self.flat = hasattr(known, "num_patches") and not hasattr(known, "image_size")
        takes = inspect.signature(type(self.tower).forward).parameters
        self.interpolates = INTERPOLATE in takes
        self._look(known, pool)
        if requested_backend() != "auto":
            use_ours(self.tower)

    def _made(self, pretrained: str | None, fields: dict[str, Any]) -> Any:
        shapes_only = torch.get_default_device().type == "meta"
        if "model_type" in fields and (pretrained is None or shapes_only):
            config = _checked(make_config(AutoConfig, fields, "encoder.config"))
        else:
            config = _vision_config(str(pretrained), fields)
        if pretrained is None or shapes_only:
            return AutoModel.from_config(config, trust_remote_code=False, **_options(config))
        options = {"config": config, **_options(config)}
        with quiet():  # of the text tower beside it, whose weights are left
            return load_weights(AutoModel, pretrained, "encoder.pretrained", **options)

    def _look(self, config: Any, pool: bool) -> None:
        """See where the patches stand, by a picture of nothing in a copy without memory."""
        with torch.device("meta"), torch.no_grad():
            blank = AutoModel.from_config(config, trust_remote_code=False, **_options(config))
            found = blank(**self._inputs(torch.empty(1, 3, self.stored_size, self.stored_size)))
        patches = (self.stored_size // self.patch_size) ** 2
        self.own_tokens = found.last_hidden_state.shape[1] - patches
        if found.last_hidden_state.ndim != 3 or self.own_tokens < 0:
            raise ValueError(f"a {config.model_type} gives no states of patches; tested: {TESTED}")
        pooled = getattr(found, "pooler_output", None)
        self.pools = pooled is not None and pooled.shape[-1] == self.dim and (pool or self.own_tokens > 0)
        self.special_tokens = max(self.own_tokens, int(self.pools))
        if not self.pools and hasattr(self.tower, "use_head"):
            self.tower.use_head, self.tower.head = False, None

    @property
    def without_source(self) -> dict[str, Any]:
        """Settings that take the place of those given, to build the same tower without reading a
        checkpoint."""
        return {"pretrained": None, "config": plain_config(self.tower.config)}

    def sharding_units(self) -> list[nn.Module]:
        """Modules that FSDP shards one by one: the blocks of the longest module list."""
        modules = self.tower.modules()
        lists = [list(module) for module in modules if isinstance(module, nn.ModuleList)]
        return max(lists, key=len) if lists else [self.tower]

    def forward(self, pixels_N3SS: Tensor, *, layers: Sequence[int] = (-1,), keep: float = 1.0) -> list[Tensor]:
        """Encode images.

        Args:
            layers: which hidden states to return, as in Hugging Face: 0 is the input of the first
                block, -1 the tower's last hidden state.
            keep: 1.0; towers of transformers see all patches.

        Returns:
            One (N, P, D) tensor for each entry of `layers`.
        """
        if keep != 1.0:
            raise ValueError(f"keep_tokens={keep}: a tower of transformers sees all patches; set it to 1.0")
        numbers = self.layer_numbers(layers)
        inner = any(number < self.depth for number in numbers)
        found = self.tower(**self._inputs(pixels_N3SS), output_hidden_states=inner)
        last = self._with_summary(found)
        return [last if n == self.depth else self._in_place(found.hidden_states[n]) for n in numbers]

    def _inputs(self, pixels_N3SS: Tensor) -> dict[str, Any]:
        if self.flat:
            return flat_inputs(pixels_N3SS, self.patch_size)
        sides = tuple(pixels_N3SS.shape[-2:])
        other = self.interpolates and sides != (self.stored_size, self.stored_size)
        return {"pixel_values": pixels_N3SS, **({INTERPOLATE: True} if other else {})}

    def _with_summary(self, found: Any) -> Tensor:
        """The last states with the pooled vector in front, in place of the class token if there is
        one."""
        states = found.last_hidden_state
        if not self.pools:
            return states
        return torch.cat([found.pooler_output[:, None].to(states.dtype), states[:, min(1, self.own_tokens) :]], dim=1)

    def _in_place(self, states_NPD: Tensor) -> Tensor:
        """States of an inner layer, with zeros where the last one has the pooled vector, so that
        all layers have their patches in the same places."""
        return F.pad(states_NPD, (0, 0, self.special_tokens - self.own_tokens, 0))


def side_of(config: Any) -> int:
    """Side in pixels of the pictures that a configuration of transformers is made for."""
    if hasattr(config, "image_size"):
        return config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    return round(config.num_patches**0.5) * config.patch_size  # SigLIP 2 for any proportions


def flat_inputs(pixels_N3SS: Tensor, patch: int) -> dict[str, Any]:
    """Pictures as patches, row by row, as a tower for any proportions (NaFlex) reads them: values
    of a patch by row, column and channel."""
    count, (rows, columns) = len(pixels_N3SS), (side // patch for side in pixels_N3SS.shape[-2:])
    whole = pixels_N3SS[..., : rows * patch, : columns * patch]
    patches = whole.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    return {
        "pixel_values": patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2),
        "pixel_attention_mask": None,  # all of them are there
        "spatial_shapes": torch.tensor([[rows, columns]] * count, device="cpu"),
    }


def _vision_config(pretrained: str, fields: dict[str, Any]) -> Any:
    """The configuration of the tower in a checkpoint, with some fields changed."""
    try:
        found = AutoConfig.from_pretrained(model_source(pretrained, "encoder.pretrained"), trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"encoder.pretrained={pretrained} cannot be read: {error}") from error
    found = getattr(found, "vision_config", found)
    found._attn_implementation = fields.get("attn_implementation")  # not what the folder asks for
    found.update({key: value for key, value in fields.items() if key != "model_type"})
    return _checked(found)


def _checked(config: Any) -> Any:
    whole = isinstance(getattr(config, "patch_size", None), int) and hasattr(config, "hidden_size")
    if config.model_type == "timm_wrapper" or not whole:
        why = "is built by timm" if config.model_type == "timm_wrapper" else "has no square patches"
        raise ValueError(f"encoder: a {config.model_type} {why}; choose a tower of transformers (tested: {TESTED})")
    return config


def _options(config: Any) -> dict[str, Any]:
    """Without a pooling layer on top that checkpoints of such models may lack (ViT)."""
    kind: Any = AutoModel._model_mapping[type(config)]
    takes = inspect.signature(kind).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
