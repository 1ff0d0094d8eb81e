"""Videos whose steps are pictures of their own, each behind the text that tells its time, as Qwen3-VL
reads them (Bai et al. 2025, Qwen3-VL, section 2.3; official `processing_qwen3_vl.py`). Data has one
mark a video, so that marks change where text goes into a row.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

from lightning_internvl.data.collate.base import check_video_marks
from lightning_internvl.data.files.frame_times import times_fault
from lightning_internvl.data.templates import VIDEO, Message
from lightning_internvl.data.templates.base import rewritten


def with_times(conversation: Sequence[Message], videos: Sequence[Sequence[float]], sample: str) -> list[Message]:
    """Messages with a mark for each step of a video, behind its time, in place of one for the video.

    Args:
        videos: for each the seconds at which its steps stand.
        sample: its name in messages.

    Raises:
        ValueError: unless there is one mark a video, and for times that are none or go back.
    """
    check_video_marks(conversation, len(videos), sample)
    for times in videos:
        if fault := times_fault(times):
            raise ValueError(f"sample {sample}: the steps of a video stand at {fault}")
    waiting = iter(videos)

    def changed(texts: Iterable[str]) -> list[str]:
        pieces = [[part] if part != VIDEO else _steps(next(waiting)) for part in texts]
        return list(itertools.chain(*pieces))

    return rewritten(conversation, f"({re.escape(VIDEO)})", changed)


def _steps(times: Sequence[float]) -> list[str]:
    return [piece for time in times for piece in (f"<{time:.1f} seconds>", VIDEO)]
