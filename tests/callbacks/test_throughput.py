"""FLOPs of real tokens, held against PyTorch's counter, and the share of the peak that they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from runs import ROOT, TINY, read_json, train
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import lightning_internvl.cli  # noqa: F401  # for its resolvers
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.inference.collators import make_view
from lightning_internvl.layers.attention import requested_backend
from lightning_internvl.model.compose import compose_model
from lightning_internvl.plan.flops import Amount, Flops, NotMeasurableError, amount_of, measure_flops, peak_flops, shorten_texts
from lightning_internvl.stages import Stage
from lightning_internvl.training.assembly import build_stage

STAGES = ("contrastive", "generative", "supervised")
# Wide enough for matrix products to be most of the work, as in any model that is trained.
SIZES = (
    *TINY, "encoder.dim=96", "encoder.depth=3", "encoder.mlp_dim=192", "encoder.patch_size=8", "middleware.dim=96",
    "middleware.depth=4", "middleware.mlp_dim=192", "decoder.config.hidden_size=96", "decoder.config.intermediate_size=192",
    "decoder.config.num_hidden_layers=3",
)  # fmt: skip


class Toy:
    """A stage with weights, and what the meter says of it."""

    def __init__(self, name: str, *overrides: str) -> None:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = OmegaConf.to_container(compose("config", overrides=[*SIZES, *overrides]), resolve=True)
        settings = self.settings = stage_settings(config, name)
        model, tokenizers = compose_model(settings.parts.config, build)
        self.stage: Stage = build_stage(settings, model, Path(), build).train()
        self.stage.plan.apply(model, 0)
        self.blank = make_view(settings, model, tokenizers, build).training.blank
        self.flops: Flops = measure_flops(settings, self.blank, build, 0)

    def batch(self, rows: int = 2, share: float = 1.0) -> dict[str, Any]:
        """Real tensors, in which every token is learnt."""
        batch = shorten_texts(self.blank(rows), share)
        return {name: torch.ones_like(x) if "labels" in name else x for name, x in batch.items()}

    def counted(self, batch: dict[str, Any]) -> float:
        """FLOPs of the parts in a real step, by PyTorch."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            losses = self.stage.losses(batch)
            sum(losses.values()).backward()
        return counter.get_total_flops()

    def ours(self, batch: dict[str, Any]) -> float:
        return sum(self.flops.of(amount_of(batch)).values())


@pytest.fixture(scope="module")
def toys() -> dict[str, Toy]:
    return {name: Toy(name) for name in STAGES}


def linear_weights(module: nn.Module, without: str = "lm_head") -> int:
    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Linear) and not n.endswith(without)]
    return sum(m.weight.numel() for _, m in layers)


@pytest.mark.parametrize("share", [1.0, 0.8, 0.6])
@pytest.mark.parametrize("name", STAGES)
def test_without_padding_it_agrees_with_pytorch(name: str, share: float, toys: dict[str, Toy]) -> None:
    batch = toys[name].batch(share=share)
    assert toys[name].ours(batch) == pytest.approx(toys[name].counted(batch), rel=0.02)


def test_trained_6_on_the_way_4_detached_2(toys: dict[str, Toy]) -> None:
    toy = toys["supervised"]
    weights = linear_weights(toy.stage.model.decoder)
    assert toy.flops.rates["decoder"].tokens == pytest.approx(6 * weights, rel=1e-6)
    head = toy.stage.model.decoder.lm.lm_head.weight.numel()
    assert toy.flops.rates["decoder"].labelled == pytest.approx(6 * head)
    frozen = Toy("supervised", 'stages.supervised.module.train=["middleware.mlp*"]').flops.rates["decoder"]
    assert (frozen.tokens, frozen.labelled) == (pytest.approx(4 * weights, rel=1e-6), pytest.approx(4 * head))
    trained, detached = (toys[name].flops.rates["encoder"].squares for name in ("contrastive", "generative"))
    assert 2.8 < trained / detached < 3  # the first layer needs no gradient of the pixels


def test_padding_counts_nothing_and_packed_rows_count_by_sample(toys: dict[str, Toy]) -> None:
    toy, lengths = toys["supervised"], (0.6, 0.8)
    alone = [toy.batch(1, share) for share in lengths]
    sizes = [batch["input_ids"].shape[1] for batch in alone]
    padded = toy.batch(2)
    for row, size in enumerate(sizes):
        padded["attention_mask"][row, size:] = 0
        padded["labels"][row, size:] = -100
    apart = sum(toy.ours(batch) for batch in alone)
    assert toy.ours(padded) == pytest.approx(apart, rel=1e-6)
    packed: dict[str, Any] = {name: torch.cat([b[name] for b in alone], dim=1) for name in ("attention_mask", "labels")}
    packed |= {"pixel_values": padded["pixel_values"], "segments": [sizes]}
    assert toy.ours(packed) == pytest.approx(apart, rel=1e-6)
    assert toy.ours({name: x for name, x in packed.items() if name != "segments"}) > apart


def test_amounts_stay_on_the_device() -> None:
    mask = torch.ones(2, 3, dtype=torch.int64, device="meta")
    amount = amount_of({"attention_mask": mask, "labels": mask, "pixel_values": torch.ones(5, 3, 8, 8)})
    assert all(isinstance(x, Tensor) and x.is_meta for x in amount[1:])
    assert amount.plus(Amount(1, 0, 0, 0)).squares == 6


def test_measuring_leaves_the_process_as_it_was(toys: dict[str, Toy]) -> None:
    before, state = requested_backend(), torch.get_rng_state()
    measure_flops(toys["contrastive"].settings, toys["contrastive"].blank, build, 0)
    assert requested_backend() == before
    assert torch.get_rng_state().equal(state)
    assert torch.get_default_dtype() == torch.float32


def test_only_a_part_that_needs_values_goes_uncounted(monkeypatch: pytest.MonkeyPatch, toys: dict[str, Toy]) -> None:
    for error, expected in (
        (RuntimeError("Tensor.item() cannot be called on meta tensors"), NotMeasurableError),
        (TypeError("can't convert meta device type tensor to numpy"), NotMeasurableError),
        (TypeError("losses() got an unexpected keyword argument"), TypeError),
        (AttributeError("no attribute 'head'"), AttributeError),
    ):
        monkeypatch.setattr(type(toys["supervised"].stage), "losses", Mock(side_effect=error))
        with pytest.raises(expected):
            measure_flops(toys["supervised"].settings, toys["supervised"].blank, build, 0)


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert peak_flops(torch.device("cpu"))[0] is None
    assert peak_flops(torch.device("cpu"), 2.5) == (2.5e12, "callbacks.throughput.peak_tflops")
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(cuda)[0] == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some card")
    assert peak_flops(cuda) == (None, "the peak of Some card is not known; callbacks.throughput.peak_tflops=N gives one")


RUN = (
    *TINY, "max_steps=5", "callbacks.throughput.every_n_steps=2", "++callbacks.throughput.skip_steps=1",
    "callbacks.samples=null", "callbacks.evaluation=null", "callbacks.report=null", "callbacks.validation=null",
)  # fmt: skip


def test_a_run_reports_flops_and_with_a_peak_its_share(tmp_path: Path) -> None:
    change = "stages.contrastive.module.train=[middleware,objectives,{name: encoder, from_step: 3}]"
    outcome = train(*RUN, change, f"paths.run={tmp_path / 'run'}", "callbacks.throughput.peak_tflops=0.001")
    assert outcome.code == 0, outcome.err
    timing = read_json(tmp_path / "run" / "timing.json")
    for stage in STAGES:
        assert timing[stage]["mfu"] == pytest.approx(1000 * timing[stage]["model_tflops_per_s"], rel=0.05)
        assert timing[stage]["mfu"] > 0
    assert outcome.out.count("contrastive: FLOPs of a step from step 0 on: encoder: ") == 1
    assert outcome.out.count("contrastive: FLOPs of a step from step 3 on: encoder: ") == 1
    assert "contrastive: peak for MFU: 0.001 TFLOP/s (callbacks.throughput.peak_tflops)" in outcome.out


def test_on_a_cpu_no_share_is_claimed(tmp_path: Path) -> None:
    outcome = train(*RUN, "pipeline=[contrastive]", f"paths.run={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert "peak for MFU: none (of a CPU no peak is known" in outcome.out
    timing = read_json(tmp_path / "run" / "timing.json")["contrastive"]
    assert timing["model_tflops_per_s"] > 0
    assert "mfu" not in timing


def test_a_peak_that_is_none(tmp_path: Path) -> None:
    outcome = train(*RUN, f"paths.run={tmp_path / 'run'}", "callbacks.throughput.peak_tflops=-1")
    assert outcome.code == 2
    assert "callbacks.throughput.peak_tflops=-1 must be a number above 0" in outcome.err
