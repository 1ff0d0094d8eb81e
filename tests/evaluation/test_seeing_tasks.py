"""Tasks that are judged on features: on the built-in scenes, on toy folders of public layouts, and on what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from seeing_toys import seeing_predictor

from lightning_internvl.data.collate.chats import pad_rows
from lightning_internvl.data.files.images import read_image
from lightning_internvl.data.files.lazy_pictures import LazyPictures
from lightning_internvl.evaluation.classification import ZeroShotClassification, class_scores
from lightning_internvl.evaluation.features import TaskPictures, patches_of, pool_patches, scenes_of
from lightning_internvl.evaluation.probing import FeatureProbe, fit
from lightning_internvl.evaluation.retrieval import ImageTextRetrieval, best_columns, match_logits, recalls
from lightning_internvl.evaluation.segmentation import Segmentation, layers_of, mask_scores
from lightning_internvl.evaluation.segmentation_heads import LinearHead, UperNetHead
from lightning_internvl.evaluation.tasks import Retrieval, ZeroShot
from lightning_internvl.evaluation.video import ZeroShotVideo
from lightning_internvl.inference.journal import Journal
from lightning_internvl.inference.predictor import Predictor

COLOURS = {"red": (230, 30, 20), "green": (20, 200, 40), "blue": (20, 40, 220)}
SHORT = {"steps": 3, "batch_size": 4}


@pytest.fixture(scope="module")
def toy() -> Predictor:
    return seeing_predictor()


@pytest.fixture
def predictor(toy: Predictor) -> Predictor:
    toy.journal = Journal(cases=2)
    return toy


def run(task: Any, predictor: Predictor, journal: Journal | None = None) -> dict[str, float]:
    with predictor.evaluating(journal=journal):
        return task(predictor)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three colours, one folder each."""
    folder, noise = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name, rgb in COLOURS.items():
        (folder / name).mkdir()
        for number in range(4):
            pixels = np.clip(np.array(rgb) + noise.integers(-15, 16, (12, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


# --- naming -------------------------------------------------------------------------------------------------------------


def test_a_file_that_is_listed_twice_is_two_samples(predictor: Predictor, tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "none.png", tmp_path / "none.png"]
    Image.new("RGB", (4, 4)).save(files[0])
    asked = TaskPictures(predictor, LazyPictures(files, read_image), max_missing=1.0)
    assert len(list(asked.images)) == 3
    assert (asked.readable(), len(predictor.journal.missing)) == ([0], 2)
    assert {key.removeprefix(str(files[1])) for key in predictor.journal.missing} == {" (sample 2)", " (sample 3)"}


def test_shares_of_classes() -> None:
    scores = torch.tensor([[9.0, 5, 1, 0], [9, 5, 1, 0], [1, 9, 5, 0], [0, 1, 5, 9]])
    found = class_scores("x_", scores, torch.tensor([0, 1, 1, 1]), (1, 2, 4))
    assert found == pytest.approx(
        {
            "x_top1": 2 / 4, "x_top1_chance": 3 / 4, "x_top2": 3 / 4, "x_top2_chance": 1.0,
            "x_mean_per_class": (1 + 1 / 3) / 2, "x_mean_per_class_chance": 1 / 2,
        }
    )  # fmt: skip


def test_zero_shot_on_scenes_and_on_a_folder(predictor: Predictor, classes: Path, tmp_path: Path) -> None:
    scenes = run(ZeroShotClassification(samples=24), predictor)
    assert (scenes["samples"], scenes["samples_asked"]) == (24, 48)
    assert scenes["zero_shot_top5_chance"] == pytest.approx(5 / 24)  # there are 24 of 48 classes, one picture each
    assert run(ZeroShotClassification(samples=24, language="zh"), predictor)["samples"] == 24
    journal = Journal(tmp_path / "predictions.jsonl", cases=2)
    folder = run(ZeroShotClassification(path=str(classes), templates="plain"), predictor, journal)
    assert (folder["samples"], folder["samples_asked"], folder["zero_shot_top1_chance"]) == (12, 12, 1 / 3)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert sum(row["right"] for row in rows) / 12 == pytest.approx(folder["zero_shot_top1"])
    assert [row["truth"] for row in rows] == ["blue"] * 4 + ["green"] * 4 + ["red"] * 4
    assert rows[0]["key"].endswith("blue/0.png")


def test_pictures_that_cannot_be_read_are_left_out_by_name(predictor: Predictor, classes: Path) -> None:
    broken = classes / "green" / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"<html>not found</html>")
    try:
        found = run(ZeroShotClassification(path=str(classes), templates="plain", max_missing=0.1), predictor)
        assert (found["samples"], found["samples_asked"]) == (11, 12)
        assert list(predictor.journal.missing) == [str(broken)]
        with pytest.raises(ValueError, match=r"1 of 12 samples cannot be used, .* max_missing=0.01; .*green/2.png"):
            run(ZeroShotClassification(path=str(classes), templates="plain"), predictor)
        (unread := TaskPictures(predictor, LazyPictures([broken], read_image), 1.0)).images[0]
        with pytest.raises(ValueError, match=r"none of 1 samples can be used; one of them: .*green/2.png"):
            unread.readable()
    finally:
        broken.write_bytes(whole)


def test_probes_learn_colours(predictor: Predictor, classes: Path) -> None:
    for head in ("linear", "attention"):
        task = FeatureProbe(path=str(classes), train=str(classes), head=head, epochs=20, batch_size=6, lr=4.0)
        found = run(task, predictor)
        assert found["probe_top1"] == 1.0
        assert (found["fitted_on"], found["samples"]) == (12, 12)
        assert run(task, predictor) == found
    scenes = run(FeatureProbe(epochs=1, train_samples=48, samples=24), predictor)
    assert (scenes["fitted_on"], scenes["samples"], scenes["samples_asked"]) == (48, 24, 48)
    with pytest.raises(ValueError, match="more than memory=1e-06"):
        run(FeatureProbe(memory=1e-6), predictor)


def test_a_fit_leaves_the_tower_and_the_draws_of_others_alone(predictor: Predictor, classes: Path) -> None:
    before = {name: tensor.clone() for name, tensor in predictor.model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run(FeatureProbe(path=str(classes), train=str(classes), epochs=1), predictor)
    run(Segmentation(samples=2, **SHORT), predictor)
    assert torch.get_rng_state().equal(state)
    assert all(tensor.equal(before[name]) for name, tensor in predictor.model.state_dict().items())
    assert all(parameter.grad is None for parameter in predictor.model.parameters())


def test_videos_of_scenes_and_of_a_list(predictor: Predictor, tmp_path: Path) -> None:
    scenes = run(ZeroShotVideo(samples=6), predictor)
    assert (scenes["samples"], scenes["samples_asked"]) == (6, 192)
    assert {"frames1_top1", "frames8_top5_chance"} <= scenes.keys()
    for name in ("one", "two"):
        frames = [Image.new("RGB", (9, 9), (place * 20, 0, 0)) for place in range(5)]
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "val.csv").write_text("path,label\none.gif,dancing\ntwo.gif,running\n")
    found = run(ZeroShotVideo(path=str(tmp_path / "val.csv"), frames=(2,), top_k=(1,)), predictor)
    assert (found["samples"], found["frames2_top1_chance"]) == (2, 0.5)


def test_a_video_is_the_mean_of_its_frames(predictor: Predictor) -> None:
    frames = predictor.held_out.labelled().images[:8]
    task = ZeroShotVideo(frames=(1, 8))
    with predictor.evaluating():
        one, eight = task._embed_videos(predictor, SimpleNamespace(images=[task._sampled_frames(frames)]))
        single = predictor.embed_images(frames, "c")
    mean = single.mean(dim=0)
    assert torch.allclose(one[0], single[4], atol=1e-6)
    assert torch.allclose(eight[0], mean / mean.norm(), atol=1e-6)


# --- retrieval ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [0, 3])
@pytest.mark.parametrize("block", [1, 50, 10**6])
def test_blocks_find_what_the_whole_matrix_holds(queries: int, block: int) -> None:
    shape = (11, queries, 6) if queries else (11, 6)
    image, text = torch.randn(shape), torch.randn(17, 6)
    whole = (image @ text.T).amax(dim=1) if queries else image @ text.T
    for rows, columns, scores in ((image, text, whole), (text, image, whole.T)):
        values, places = best_columns(rows, columns, 4, block)
        assert torch.allclose(values, scores.topk(4, dim=1).values)
        assert places.equal(scores.topk(4, dim=1).indices)


def test_one_of_several_captions_is_enough() -> None:
    owner = torch.tensor([0, 0, 0, 1])
    found = recalls("x_", torch.tensor([[3, 2], [0, 1]]), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]]), owner, (1, 2))
    assert found == pytest.approx(
        {
            "x_image_to_text_r1": 0.0, "x_image_to_text_r1_chance": 1 / 2,
            "x_image_to_text_r2": 0.5, "x_image_to_text_r2_chance": 1.0,
            "x_text_to_image_r1": 0.75, "x_text_to_image_r1_chance": 0.5,
            "x_text_to_image_r2": 1.0, "x_text_to_image_r2_chance": 1.0,
        }
    )  # fmt: skip


def test_reranking_reads_every_pair_as_the_model_does(predictor: Predictor) -> None:
    data = predictor.held_out.captioned()
    places = [place for place in range(12) for _ in range(2)]
    others = [other for place in range(12) for other in (place, (place + 5) % 12)]
    with predictor.evaluating():
        ours = match_logits(predictor, data.images, data.captions, torch.tensor(places), torch.tensor(others))
        ids, mask = pad_rows(*predictor.pairs.rows("itm", [data.captions[other] for other in others]))
        theirs = predictor.model.match(predictor.pairs.pixels(data.images[places], ["picture"] * 24), ids, mask)
    assert torch.allclose(ours, theirs[:, 1], atol=1e-5)
    assert ours.std() > 0.01


def test_reranked_recall(predictor: Predictor) -> None:
    found = run(ImageTextRetrieval(rerank=12, mode="g"), predictor)
    assert {"g_image_to_text_r1", "itm_image_to_text_r1", "itm_text_to_image_r10_chance"} <= found.keys()
    assert found["g_image_to_text_r10"] >= found["g_image_to_text_r1"]
    few = run(ImageTextRetrieval(rerank=2, top_k=(2, 5)), predictor)  # the order of the best two changes, who they are does not
    plain = run(ImageTextRetrieval(top_k=(2, 5)), predictor)
    for name, value in plain.items():
        if "chance" not in name and "samples" not in name and name != "captions":
            assert few[name.replace("c_", "itm_", 1)] == value
    objectives, predictor.model.objectives = predictor.model.objectives, torch.nn.ModuleDict()
    with pytest.raises(ValueError, match="rerank=3 needs a matching head"):
        run(ImageTextRetrieval(rerank=3), predictor)
    predictor.model.objectives = objectives


def test_retrieval_of_a_file(predictor: Predictor, classes: Path) -> None:
    records = [{"image": f"{name}/0.png", "caption": [f"all {name}", f"{name} everywhere", "x"]} for name in COLOURS]
    (classes / "test.json").write_text(json.dumps(records))
    found = run(ImageTextRetrieval(path=str(classes / "test.json"), per_picture=2, top_k=(1, 2)), predictor)
    assert (found["samples"], found["samples_asked"], found["captions"]) == (3, 3, 6)
    assert found["c_image_to_text_r1_chance"] == pytest.approx(2 / 6)
    records[1]["image"] = "nowhere.png"
    (classes / "test.json").write_text(json.dumps(records))
    found = run(ImageTextRetrieval(path=str(classes / "test.json"), max_missing=0.5), predictor)
    assert (found["samples"], found["samples_asked"], found["captions"]) == (2, 3, 6)
    assert [Path(key).name for key in predictor.journal.missing] == ["nowhere.png"]


# --- segmentation -------------------------------------------------------------------------------------------------------


def test_scores_of_masks() -> None:
    confusion = torch.tensor([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
    assert mask_scores(confusion) == pytest.approx(
        {
            "miou": (6 / 9 + 1 / 4) / 2, "miou_chance": 0.8 / 2, "mean_accuracy": (6 / 8 + 1 / 2) / 2,
            "mean_accuracy_chance": 1 / 2, "pixel_accuracy": 0.7, "pixel_accuracy_chance": 0.8,
        }
    )  # fmt: skip
    with pytest.raises(ValueError, match="judge no pixel"):
        mask_scores(torch.zeros(3, 3, dtype=torch.int64))


@pytest.mark.parametrize("side", [1, 2, 5])
def test_heads_answer_for_every_place(side: int) -> None:
    states = [torch.randn(2, 24, side, side) for _ in range(4)]
    assert LinearHead(24, 7, 8)(states[-1:]).shape == (2, 7, side, side)
    assert UperNetHead(24, 7, 8)(states).shape == (2, 7, 4 * side, 4 * side)


def test_layers_lie_evenly_apart() -> None:
    assert layers_of(SimpleNamespace(depth=48), 4) == [-37, -25, -13, -1]
    assert layers_of(SimpleNamespace(depth=3), 4) == [-3, -2, -1, -1]
    assert layers_of(SimpleNamespace(), 1) == [-1]
    with pytest.raises(ValueError, match=r"does not say how many layers it has; give layers="):
        layers_of(SimpleNamespace(), 4)


def test_segmentation_of_scenes(predictor: Predictor) -> None:
    for head in ("linear", "upernet"):
        found = run(Segmentation(head=head, samples=5, width=8, **SHORT), predictor)
        assert (found["samples"], found["samples_asked"]) == (5, 500)
        assert 0 <= found["miou"] <= 1


def test_a_head_learns_where_colours_are(predictor: Predictor, tmp_path: Path) -> None:
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for place, left in enumerate((1, 2)):
            mask = np.full((24, 40), 3 - left, dtype=np.uint8)
            mask[:, :20], mask[:4] = left, 0
            Image.fromarray(mask).save(tmp_path / f"annotations/{split}/{place}.png")
            Image.fromarray(np.array([(0, 0, 0), (240, 20, 20), (20, 20, 240)], dtype=np.uint8)[mask]).save(
                tmp_path / f"images/{split}/{place}.jpg", quality=95
            )
    task = Segmentation(path=str(tmp_path), classes=2, steps=40, batch_size=2, lr=0.03)
    found = run(task, predictor)
    assert found["miou"] > 0.8
    assert found["pixel_accuracy_chance"] == 0.5  # rows of 0 are not judged
    assert len(predictor.journal.shown) == 2
    Image.new("L", (3, 3), 1).save(tmp_path / "annotations/validation/1.png")
    with pytest.raises(ValueError, match=r"validation/1.jpg has 40 x 24 px, but its annotation .* 3 x 3"):
        run(task, predictor)


# --- shared -------------------------------------------------------------------------------------------------------------


def test_patches_are_told_from_the_class_token() -> None:
    states = torch.arange(2 * 10 * 1.0).view(1, 10, 2)
    assert patches_of(states)[0].equal(states[:, 1:])
    assert patches_of(states[:, :9])[1] == 3
    assert pool_patches(states).tolist() == [[0.0, 1.0, 10.0, 11.0]]
    assert pool_patches(states[:, 1:]).tolist() == [[10.0, 11.0]]
    with pytest.raises(ValueError, match="12 visual tokens are no square"):
        patches_of(torch.zeros(1, 12, 2))


def test_models_of_other_data_are_shown_scenes_of_their_size(predictor: Predictor) -> None:
    held_out, predictor.held_out = predictor.held_out, None
    assert (scenes_of(predictor).image_size, scenes_of(predictor).seed) == (16, 0)
    predictor.held_out = held_out
    assert scenes_of(predictor) is held_out


def test_fitting_in_whole_batches() -> None:
    probe, features = torch.nn.Linear(2, 2), torch.randn(5, 2)
    fit(probe, features, (features[:, 0] > 0).long(), epochs=60, batch_size=4, lr=0.5, weight_decay=0.0)
    assert probe(features).argmax(dim=1).equal((features[:, 0] > 0).long())


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (ZeroShotClassification, {"names": "names.txt"}, "give path=FOLDER"),
        (
            ZeroShotClassification,
            {"path": "x", "templates": "imagnet"},
            "'imagnet' are not known; valid choices: imagenet",
        ),
        (ZeroShotClassification, {"language": "fr"}, "language='fr' is not known; valid choices: en, zh"),
        (ImageTextRetrieval, {"language": "fr"}, "valid choices: en, zh"),
        (ImageTextRetrieval, {"block": 0}, "block=0 above 0"),
        (FeatureProbe, {"head": "mlp"}, "head='mlp' is not known; valid choices: linear, attention"),
        (FeatureProbe, {"path": "val"}, "fitted on one folder and scored on another"),
        (Segmentation, {"head": "fcn"}, "valid choices: linear, upernet"),
        (Segmentation, {"head": "upernet", "layers": [-1]}, "reads 4 hidden state"),
        (Segmentation, {"classes": 300}, "classes=300 from 2 to 255"),
        (ZeroShotVideo, {"frames": []}, "must be numbers from 1 on"),
        (ZeroShotVideo, {"videos": "val"}, "give path=FILE"),
    ],
)
def test_wrong_settings(task: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**options)


# --- one family ---------------------------------------------------------------------------------------------------------


def test_a_stage_and_evaluate_measure_the_same_under_the_same_names(predictor: Predictor) -> None:
    pairs = (
        (ZeroShot(mode="g"), ZeroShotClassification(mode="g")),
        (Retrieval(mode="c", name="c_zh", language="zh"), ImageTextRetrieval(language="zh")),
    )
    for of_stage, of_command in pairs:
        found, again = run(of_stage, predictor), run(of_command, predictor)
        assert found
        assert found == {name: again[name] for name in found}
