"""Rules name parameters by role, so that they hold for any part: the default recipe with each toy encoder and middleware."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

from lightning_internvl.checkpoints.load_report import LoadReport
from lightning_internvl.cli import CONF
from lightning_internvl.config.run_settings import RunSettings
from lightning_internvl.config.stage_settings import stage_settings
from lightning_internvl.config.targets import build
from lightning_internvl.encoders.hybrid import HybridEncoder
from lightning_internvl.layers.state_dict import own_tensors
from lightning_internvl.middleware.qllama import QLLaMA
from lightning_internvl.model.compose import compose_model
from lightning_internvl.pipeline import rehearse
from lightning_internvl.stages import Stage
from lightning_internvl.stages.freezing import FreezePlan
from lightning_internvl.stages.roles import _tell, model_roles, names_of, roles_of
from lightning_internvl.training.assembly import build_stage
from lightning_internvl.training.optim import parameter_groups

TOYS = sorted(path.stem for path in (CONF / "encoder").glob("*_toy.yaml"))
NO_FIT = {
    "qwen2_vit_toy": "choose middleware=patch_merger", "qwen2_5_vit_toy": "choose middleware=patch_merger",
    "qwen3_vit_toy": "choose middleware=patch_merger",
    "deepseek_hybrid_toy": "choose middleware=hybrid_mlp",
}  # fmt: skip
# What the encoders trained before rules had roles: in the contrastive stage all but these.
WAITING = {"query_tokens", "clip_projector2", "qllama.lm_head", "qllama.model.layers.0.cross_attn"}


def composed(*words: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=[*words, "paths.run=unused"]), resolve=True)


def rehearsed(*words: str) -> None:
    stages = RunSettings.of(composed(*words)).stages
    rehearse(stages.values(), Path("unused"), build, fresh=True)


def stage_of(name: str, *words: str, train: list[Any] | None = None) -> Stage:
    settings = stage_settings(composed(*words), name)
    settings.module.update({"train": train} if train else {})
    with torch.device("meta"):
        model, _ = compose_model(settings.parts.config, build)
        return build_stage(settings, model, Path("unused"), build)


@pytest.mark.parametrize("encoder", TOYS)
def test_the_default_recipe_takes_every_toy_encoder(encoder: str) -> None:
    if encoder in NO_FIT:
        with pytest.raises(ValueError, match=f"do not fit.*{NO_FIT[encoder]}, which needs .*experiment="):
            rehearsed(f"encoder={encoder}")
        return
    rehearsed(f"encoder={encoder}")
    stage = stage_of("contrastive", f"encoder={encoder}")
    groups = {group["name"]: group for group in stage.optimizer(stage.model, stage.plan).param_groups}
    patches = groups["encoder.@patch_embedding"]
    assert patches["lr"] == 1e-4
    assert [p.ndim for p in patches["params"]] == [4]  # the convolution over pixels


@pytest.mark.parametrize(
    ("middleware", "message"),
    [
        ("clip_text_toy", r"stages\.generative: CLIPText does not read pictures and texts together.*qllama_toy, qformer_toy"),
        ("mlp", r"hands tokens to a decoder, and this stage has none\. Choose one that reads text"),
        ("perceiver_toy", r"valid choices: pairs .*Choose one that reads text \(qllama_toy"),
        ("linear_probe", r"valid choices: pairs .*Choose one that reads text \(qllama_toy"),
    ],
)
def test_a_middleware_that_cannot_do_all_stages_is_refused_with_what_fits(middleware: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rehearsed(f"middleware={middleware}")


def test_a_q_former_in_the_default_recipe() -> None:
    with pytest.raises(ValueError, match=r"ITC compares .* pictures.*QFormer embeds queries; give objective=query_itc"):
        rehearsed("middleware=qformer_toy")
    rehearsed("middleware=qformer_toy", "objective=query_itc", "+objective@stages.generative.objectives.itc=query_itc")
    stage = stage_of("contrastive", "middleware=qformer_toy", "objective=query_itc")
    frozen = {name for name, _ in stage.model.named_parameters()} - stage.trained_names()
    assert frozen
    assert all(name.startswith("middleware.qformer.head") for name in frozen)


def test_the_default_recipe_trains_what_it_trained() -> None:
    stage = stage_of("contrastive")
    frozen = {name for name, _ in stage.model.named_parameters()} - stage.trained_names()
    below = {name.removeprefix("middleware.") for name in frozen}
    assert {one for one in WAITING if any(f"{name}.".startswith(f"{one}.") for name in below)} == WAITING
    assert all(any(f"{name}.".startswith(f"{one}.") for one in WAITING) or ".cross_attn." in name for name in below)
    supervised = stage_of("supervised")
    assert {name.split(".")[1] for name in supervised.trained_names() if name.startswith("middleware")} == {"mlp1", "mlp2"}


class Plain(nn.Module):
    """A part of one's own, without roles."""

    def __init__(self) -> None:
        super().__init__()
        self.widen = nn.Linear(2, 2)


class Model(nn.Module):
    """Two parts without roles and a loss without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middleware = Plain(), Plain()
        self.objectives = nn.ModuleDict({"mine": nn.Identity()})


def test_a_part_without_roles_has_a_rule_apply_to_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    roles = model_roles(model)
    _tell.cache_clear()  # of what other tests were told
    rules = ["encoder.@patch_embedding", {"name": "middleware.@generative", "frozen": True}, "middleware"]
    for _ in range(2):
        plan = FreezePlan(rules, roles=roles)
        plan.check(model)
        parameter_groups(model, plan, lr=1.0, weight_decay=0.0, part_lr={"encoder.@patch_embedding": 0.1})
    assert {name.partition(".")[0] for name, _ in model.named_parameters() if plan.ever_trains(name)} == {"middleware"}
    told = capsys.readouterr().out
    assert told.count("train: encoder.@patch_embedding applies to nothing, the encoder names no patch_embedding") == 1
    assert names_of("middleware.@connector", roles, "train") == ("middleware",)  # all of it


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("encoder.@patch_embeding", r"no role 'patch_embeding'; did you mean 'patch_embedding'\?"),
        ("decoder.@connector", "there is no part 'decoder' here; valid choices: encoder, middleware"),
        ("encoder.embeddings.patch_embedding", "matches no parameter"),
        ({"name": "encoder", "frozen": True, "from_step": 3}, "what is frozen has no steps"),
    ],
)
def test_other_rules_that_match_nothing_are_refused(rule: Any, message: str) -> None:
    model = Model()
    with pytest.raises(ValueError, match=message):
        FreezePlan(["middleware", rule], roles=model_roles(model)).check(model)


def test_a_loss_without_parameters_may_be_named() -> None:
    model = Model()
    for rule in ("objectives", "objectives.mine"):
        FreezePlan(["encoder", rule]).check(model)
    with pytest.raises(ValueError, match=r"'objectives\.other' matches no parameter"):
        FreezePlan(["encoder", "objectives.other"]).check(model)
    model.objectives = nn.ModuleDict()
    with pytest.raises(ValueError, match="'objectives' matches no parameter"):
        FreezePlan(["encoder", "objectives"]).check(model)


def test_what_is_frozen_is_no_part_of_the_optimizer_and_the_table_says_why() -> None:
    model = Model()
    plan = FreezePlan([{"name": "encoder.widen.bias", "frozen": True}, "encoder"])
    assert [plan.ever_trains(name) for name, _ in model.encoder.named_parameters("encoder")] == [True, False]
    assert plan.table(model, 0)[0]["why"] == "encoder; encoder.widen.bias is frozen"
    assert plan.changes() == [0]


def test_a_name_with_a_rate_of_its_own_does_not_take_that_of_its_role() -> None:
    stage = stage_of("contrastive")
    rates = {"encoder.@patch_embedding": 0.5, "encoder.embeddings.patch_embedding": 0.25}
    groups = parameter_groups(stage.model, stage.plan, lr=1.0, weight_decay=0.0, part_lr=rates)
    assert {group["lr"] for group in groups} == {1.0, 0.25}


def test_roles_of_names_that_a_stage_may_lack_or_leave() -> None:
    stage = stage_of("supervised")
    tensors = {name: tensor for name, tensor in own_tensors(stage.model).items() if not name.startswith("middleware.mlp")}
    options = {"source": "a start", "dropped": []}
    report = LoadReport.of(stage.model, tensors, new=["middleware.@connector"], **options)
    assert {name.split(".")[1] for name in report.new} == {"mlp1", "mlp2"}
    with pytest.raises(ValueError, match="a start lacks names that the stage does not list under `new`"):
        LoadReport.of(stage.model, tensors, new=["middleware.@language_head"], **options)


@pytest.mark.parametrize("decoder", sorted(path.stem for path in (CONF / "decoder").glob("*_toy.yaml")))
def test_the_table_of_words_is_what_the_default_trains_of_a_decoder_before_its_last_stage(decoder: str) -> None:
    stage = stage_of("words", f"decoder={decoder}")
    table = stage.model.decoder.lm.get_input_embeddings().weight
    assert [p for name, p in stage.model.named_parameters() if name.startswith("decoder.") and stage.plan.ever_trains(name)] == [
        table
    ]


def test_classes_say_their_roles() -> None:
    roles = roles_of({"encoder": HybridEncoder, "middleware": QLLaMA})
    assert names_of("encoder.@patch_embedding", roles, "train") == ("encoder.*.patch_embed*",)
    assert names_of("middleware.@connector", roles, "train") == ("middleware.mlp*",)
    assert names_of("decoder.lm", roles, "train") == ("decoder.lm",)


RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*_toy.yaml"))
# Of no layer, and yet multiplied with what flows through.
MATRICES = (".text_projection", ".plora.")
NEVER = {
    "blip2_toy": {"middleware.qformer.embeddings.positions.weight", "decoder.lm.model.decoder.embed_positions.weight"},
    "clip_rn50_toy": {"encoder.attnpool.positional_embedding", "middleware.text_model.embeddings.token_embedding.weight"},
    "clip_toy": {"middleware.text_model.embeddings.token_embedding.weight"},
    "deepseek_vl_toy": {"encoder.high.blocks.0.attn.rel_pos_h", "encoder.high.pos_embed"},
    "flamingo_toy": {"middleware.latents", "middleware.blocks.0.ff.1.weight"},
    "qwen_vl_toy": {"middleware.query_tokens"},
    "xcomposer_toy": {"middleware.flag_start", "middleware.query_tokens"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_what_multiplies_decays(recipe: str) -> None:
    """Tables of words and positions, queries, tokens and flags do not, in whatever part they stand."""
    config, seen = composed(f"experiment={recipe}"), set()
    for stage in {config["pipeline"][0], config["pipeline"][-1]}:
        with torch.device("meta"):
            model, _ = compose_model(stage_settings(config, stage).parts.config, build)
        groups = parameter_groups(model, FreezePlan(["*"]), lr=1.0, weight_decay=0.1)
        decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        layers = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)}
        named = dict(model.named_parameters())
        tables = decaying - layers
        assert not [name for name, p in named.items() if id(p) in tables and not any(word in name for word in MATRICES)]
        assert not {name for name in NEVER.get(recipe, ()) if name in named and id(named[name]) in decaying}
        blocks = [p for block in model.encoder.sharding_units() for p in block.parameters() if id(p) in layers]
        assert blocks
        assert {id(p) for p in blocks} <= decaying
        seen |= named.keys()
    assert NEVER.get(recipe, set()) <= seen
