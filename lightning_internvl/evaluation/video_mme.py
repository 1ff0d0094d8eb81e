"""Video-MME: questions about videos of seconds to an hour (Fu et al., 2024, arXiv:2405.21075)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lightning_internvl.data.files.videos import read_video
from lightning_internvl.data.templates import VIDEO, message_of
from lightning_internvl.evaluation.answer_task import Case
from lightning_internvl.evaluation.benchmark_files import field
from lightning_internvl.evaluation.benchmark_tables import Row, read_rows
from lightning_internvl.evaluation.metrics.option_letters import letter_of_video_mme
from lightning_internvl.evaluation.multiple_choice import MultipleChoice, choice_of, lettered
from lightning_internvl.inference.predictor import Metrics, Predictor
from lightning_internvl.messages import number_faults

ENDINGS = (".mp4", ".mkv", ".webm", ".gif", "")  # of a video's file; "" is a folder of frames


class VideoMME(MultipleChoice):
    """Accuracy over all, by duration, domain and kind of task. An answer that chooses no option is
    wrong; the official script leaves it out, as `accuracy_of_answered` does.

    Args:
        path: the parquet of the set.
        videos: the folder of the videos, named by "videoID"; None: "data" or "video" beside path.
        frames: of a video, spread evenly, that the model is given; it may look at fewer of them.
    """

    PROMPT = (
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the"
        " letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
    )

    SHOWN = "video"

    def __init__(self, *, videos: str | None = None, frames: int = 64, **options: Any) -> None:
        super().__init__(**options)
        assert self.path is not None  # as the constructor of all such tasks has seen
        if faults := list(number_faults("frames", frames, least=1, whole=True)):
            raise ValueError(faults[0])
        self.frames = frames
        near = [folder for parent in self.path.parents[:2] for folder in (parent / "data", parent / "video")]
        self.videos = Path(videos) if videos else next((folder for folder in near if folder.is_dir()), self.path.parent)
        if not self.videos.is_dir():
            raise ValueError(f"{videos=}: there is no such folder")
        # questions about a video stand together
        self._read = lru_cache(maxsize=1)(lambda path: read_video(path, self.frames))

    def cases(self, predictor: Predictor) -> list[Case]:
        assert self.path is not None  # as the constructor has seen
        if not predictor.chats.reads_videos:
            ways = "choose one with data.video_token, or set data.chats_collate.video_frames"
            raise ValueError(f"Video-MME asks about videos, and this model reads pictures only; {ways}")
        return [self._case(row) for row in read_rows(self.path)]

    def _case(self, row: Row) -> Case:
        key, name, question = (str(field(row.values, (column,), row.place)) for column in ("question_id", "videoID", "question"))
        texts = [str(text) for text in field(row.values, ("options",), row.place)]
        options = {letter: text.removeprefix(f"{letter}. ") for letter, text in lettered(texts).items()}
        groups = [str(row.values[column]) for column in ("domain", "task_type") if column in row.values]
        file = next((path for end in ENDINGS if (path := self.videos / f"{name}{end}").exists()), self.videos / f"{name}.mp4")
        truth = choice_of(options, row.values.get("answer"), row.place)
        return Case(key, file, question, truth, str(row.values.get("duration", "")), groups=tuple(groups))

    def look(self, case: Case) -> tuple[np.ndarray, float]:
        return self._read(case.picture)

    def cover(self, case: Case) -> np.ndarray:
        frames, _ = self.look(case)
        return frames[len(frames) // 2]

    def ask(self, seen: Sequence[tuple[Case, Any]], predictor: Predictor) -> list[str]:
        answers = []
        for case, shown in seen:
            turns = [message_of("user", [VIDEO, self._prompt_for(case)])]
            sample = {"images": [], "videos": [shown], "conversation": turns, "key": case.key}
            answers += predictor.complete([sample], self.max_new_tokens, **self.search_options())
        return answers

    def _questions_at_a_time(self, predictor: Predictor) -> int:
        return 1  # a video is as large as a batch of pictures

    def letter(self, case: Case, answer: str) -> str:
        return letter_of_video_mme(answer)

    def shares_read(self, cases: Sequence[Case], answers: Sequence[str]) -> Metrics:
        found = super().shares_read(cases, answers)
        answered = [pair for pair in zip(cases, answers, strict=True) if self.letter(*pair)]
        right = sum(self.judge(case, answer) for case, answer in answered)
        return {"accuracy_of_answered": right / len(answered) if answered else 0.0, **found}
