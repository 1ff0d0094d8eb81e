"""Naming videos by sentences alone, a video being the mean of some frames (InternVL, section 4.2).

Letters: V videos, C classes, E contrastive width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_internvl.data.files.class_prompts import prompts, read_prompts
from lightning_internvl.data.files.lazy_pictures import LazyPictures
from lightning_internvl.data.files.video_lists import read_video_list
from lightning_internvl.data.files.videos import frame_places
from lightning_internvl.data.scenes.videos import scene_videos
from lightning_internvl.evaluation.classification import Metrics, classifier, score_pictures
from lightning_internvl.evaluation.features import GREY, TaskPictures, scenes_of
from lightning_internvl.inference.predictor import Predictor
from lightning_internvl.objectives import similarities

SCENE_VIDEOS = 192  # that are scored unless told otherwise


class ZeroShotVideo:
    """Naming a video by the nearest class, once for each number of frames.

    Args:
        path: a list of videos and labels (see `read_video_list`); None: built-in things that move.
        videos: the folder where the paths of videos start; None: that of the list.
        names: a file with the names of the classes, a line each.
        templates: what is said about a class, a set of
            `lightning_internvl.data.files.class_prompts` or a file; the built-in things have
            sentences of their own.
        frames: how many frames stand for a video, the middles of as many equal parts.
        mode: the image embedding, "c" or "g" where the model has both.
        samples: only that many videos, spread over the list.
        max_missing: the share of videos that may be unreadable.
    """

    needs = "pairs"

    def __init__(
        self,
        *,
        path: str | None = None,
        videos: str | None = None,
        names: str | None = None,
        templates: str = "actions",
        frames: Sequence[int] = (1, 8),
        mode: str = "c",
        top_k: Sequence[int] = (1, 5),
        samples: int | None = None,
        max_missing: float = 0.01,
        version: int = 2,
    ) -> None:
        if not frames or min(frames) < 1:
            raise ValueError(f"{frames=} must be numbers from 1 on")
        if path is None and (videos or names):
            both = f"{videos=} and {names=}"
            raise ValueError(f"{both} belong to a list of videos; give path=FILE with them")
        read_prompts(templates)  # a wrong word is told before anything is loaded
        self.path, self.videos, self.names, self.templates, self.mode = path, videos, names, templates, mode
        self.frames, self.top_k, self.samples, self.max_missing = tuple(frames), tuple(top_k), samples, max_missing

    def __call__(self, predictor: Predictor) -> Metrics:
        if self.path is None:
            scenes = scenes_of(predictor)
            count = min(self.samples or SCENE_VIDEOS, SCENE_VIDEOS)
            total = SCENE_VIDEOS
            data = scene_videos(scenes.seed, scenes.image_size, scenes.styles, count)
            said = scenes.labelled().prompts
        else:
            data = read_video_list(self.path, self.videos, self.names, self.samples)
            said, total = prompts(data.names, self.templates), data.total
        videos = LazyPictures(data.videos.items, lambda item: self._sampled_frames(data.videos.read(item)))
        asked = TaskPictures(predictor, videos, self.max_missing, blank=self._sampled_frames(GREY[None]))
        classes = classifier(predictor, said)
        metrics: Metrics = {}
        by_frames = zip(self.frames, self._embed_videos(predictor, asked), strict=True)
        for frames, embeds in by_frames:  # the last one's answers are kept
            scores = similarities(embeds, classes).float().cpu()
            question = f"which class, from {frames} frames?"
            name = f"frames{frames}_"
            metrics |= score_pictures(name, asked, scores, data.labels, data.names, self.top_k, question)
        return metrics | {"samples_asked": total}

    def _sampled_frames(self, video: np.ndarray) -> np.ndarray:
        """The frames that are looked at, for one number after the other, to save memory."""
        return video[[at for wanted in self.frames for at in frame_places(len(video), wanted)]]

    def _embed_videos(self, predictor: Predictor, asked: TaskPictures) -> list[Tensor]:
        """Every video for each number of frames: (V, E), or (V, Q, E) with an embedding a query."""
        found: list[list[Tensor]] = [[] for _ in self.frames]
        step = max(1, predictor.batch_size // sum(self.frames))
        for start in range(0, len(asked.images), step):
            videos = list(asked.images[start : start + step])
            embeds = predictor.embed_images([frame for video in videos for frame in video], self.mode)
            for place, part in enumerate(embeds.unflatten(0, (len(videos), -1)).split(self.frames, dim=1)):
                found[place].append(F.normalize(part.mean(dim=1), dim=-1))
        return [torch.cat(parts) for parts in found]
