"""CLIP's ResNets beside a written-out reference with OpenAI's names, there and back."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_internvl import load_pretrained
from lightning_internvl.checkpoints.adapters import clip_resnet
from lightning_internvl.checkpoints.families.open_clip import NOTES
from lightning_internvl.encoders.clip_resnet import CLIPResNet
from lightning_internvl.middleware.clip_text import CLIPText
from lightning_internvl.model.vlm import VLM
from lightning_internvl.objectives import ITC

State = dict[str, Tensor]


class Block(nn.Module):
    """A bottleneck of three convolutions, of PyTorch's own layers."""

    def __init__(self, inner: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        steps = OrderedDict([("-1", nn.AvgPool2d(stride)), ("0", nn.Conv2d(inner, 4 * planes, 1, bias=False))])
        steps["1"] = nn.BatchNorm2d(4 * planes)
        self.downsample = nn.Sequential(steps) if stride > 1 or inner != 4 * planes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(self.avgpool(y))) + self.downsample(x))


class Pool(nn.Module):
    """Attention pooling by PyTorch's multi-head attention."""

    def __init__(self, grid: int, dim: int, out: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, dim))
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(dim, width) for width in (dim, dim, dim, out))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(dim=0, keepdim=True), x]) + self.positional_embedding[:, None]
        biases = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        found, _ = F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], max(1, x.shape[-1] // 64), None, biases, None, None, False, 0.0, self.c_proj.weight,
            self.c_proj.bias, training=False, need_weights=False, use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        return found[0]


class Reference(nn.Module):
    def __init__(self, size: int, width: int, depths: tuple[int, ...], out: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        inner = width
        for stage, depth in enumerate(depths):
            planes, blocks = width * 2**stage, []
            for number in range(depth):
                blocks.append(Block(inner, planes, 2 if stage and not number else 1))
                inner = 4 * planes
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = Pool(size // 32, inner, out)

    def map(self, x: Tensor) -> Tensor:
        for number in (1, 2, 3):
            x = F.relu(getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(x)))
        x = F.avg_pool2d(x, 2)
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.attnpool(self.map(x))


CASES = {
    "RN50's stages": (64, 4, (3, 4, 6, 3)),
    "wide, one block a stage": (96, 6, (1, 1, 1, 1)),
    "heads of 64": (64, 4, (1, 2, 1, 1)),
}


def pair(case: str) -> tuple[Reference, VLM]:
    """The reference, and ours with its weights; texts have weights of their own."""
    torch.manual_seed(0)
    size, width, depths = CASES[case]
    theirs = Reference(size, width, depths, 16).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.2).add_(1.0 if tensor.ndim == 1 and "bias" not in name and "mean" not in name else 0.0)
                tensor.abs_() if name.endswith("running_var") else None
    encoder = CLIPResNet(image_size=size, width=width, depths=depths)
    text = {"vocab_size": 50, "positions": 12, "dim": 64, "depth": 1, "heads": 1, "mlp_dim": 128, "eos_token_id": 49}
    middleware = CLIPText(encoder_dim=encoder.dim, embed_dim=16, image_bias=True, **text)
    return theirs, VLM(encoder, middleware, objectives={"itc": ITC()}).eval()


def file_of(theirs: Reference, ours: VLM) -> State:
    """The tensors of a file of OpenAI: those of the reference, and our texts."""
    state = clip_resnet.LAYOUT.official_tensors({}, dict(ours.state_dict()))
    found = {f"visual.{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert {name for name in state if name.startswith("visual.")} == {n for n in found if not n.endswith("num_batches_tracked")}
    return {name: tensor.clone().contiguous() for name, tensor in (state | found).items()}


@pytest.mark.parametrize("case", CASES)
def test_the_same_vectors_and_maps(tmp_path: Path, case: str) -> None:
    theirs, ours = pair(case)
    tensors = file_of(theirs, ours)
    torch.save(tensors, tmp_path / "RN.pt")
    found = load_pretrained(tmp_path / "RN.pt").eval()
    pixels = torch.randn(3, 3, CASES[case][0], CASES[case][0])
    with torch.no_grad():
        torch.testing.assert_close(found.encode_image(pixels), theirs(pixels), rtol=1e-4, atol=1e-5)
        (tokens,) = found.encoder(pixels)
        torch.testing.assert_close(tokens[:, 1:], theirs.map(pixels).flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-5)
        words, mask = torch.tensor([[3, 7, 49], [5, 2, 49]]), torch.ones(2, 3)
        said = found.encode_text(words, mask)
        torch.testing.assert_close(said, ours.encode_text(words, mask))

    found.save_pretrained(tmp_path / "saved.pth")
    again = torch.load(tmp_path / "saved.pth", weights_only=True)
    again = again.get("state_dict", again)
    assert again.keys() == {name for name in tensors if not name.endswith("num_batches_tracked")}
    assert all(again[name].equal(tensors[name]) for name in again)


def test_a_folder_of_open_clip(tmp_path: Path) -> None:
    theirs, ours = pair("heads of 64")
    tensors = {name: tensor for name, tensor in file_of(theirs, ours).items() if name not in NOTES}
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    says = {"model_cfg": {"embed_dim": 16, "vision_cfg": {"layers": [1, 2, 1, 1], "width": 4}, "text_cfg": {"heads": 2}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(says))
    block = load_pretrained(tmp_path).middleware.text_model.encoder.layers[0]
    assert (block.mlp.act, block.self_attn.heads) == ("gelu", 2)
    assert load_file(tmp_path / "open_clip_model.safetensors").keys() == tensors.keys()


PUBLISHED = {  # embed_dim, image_size, depths, width, of texts; parameters as open_clip's table has them, in millions
    "RN50": (1024, 224, (3, 4, 6, 3), 64, 512, 102.01),
    "RN101": (512, 224, (3, 4, 23, 3), 64, 512, 119.69),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, 640, 178.3),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, 768, 290.98),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, 1024, 623.26),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    embed, size, depths, width, dim, millions = PUBLISHED[name]
    with torch.device("meta"):
        encoder = CLIPResNet(image_size=size, width=width, depths=depths)
        text = {"vocab_size": 49408, "positions": 77, "dim": dim, "depth": 12, "heads": dim // 64, "mlp_dim": 4 * dim}
        middleware = CLIPText(encoder_dim=encoder.dim, embed_dim=embed, image_bias=True, pooling="argmax", **text)
        (tokens,) = encoder(torch.zeros(2, 3, size, size))
    assert tokens.shape == (2, 1 + (size // 32) ** 2, 32 * width)
    count = sum(p.numel() for part in (encoder, middleware) for p in part.parameters()) + 1  # the scale of logits
    assert count / 1e6 == pytest.approx(millions, rel=5e-3)
