"""How long a run still takes, all of its stages together."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_internvl.config.filter_settings import FilterSettings
from lightning_internvl.config.stage_settings import StageSettings
from lightning_internvl.files import read_json

WINDOW = 60.0  # seconds
StepFlops = Callable[[StageSettings], float | None]  # None where they cannot be counted


class Pace:
    """Optimizer steps a second, over the last `WINDOW` seconds: what a stage does at its start, and
    what else the machine did then, is forgotten."""

    def __init__(self, step: int) -> None:
        self.marks = deque([(time.monotonic(), step)])

    def at(self, step: int) -> float:
        """The pace when this step has ended; 0 as long as none has."""
        now = time.monotonic()
        self.marks.append((now, step))
        while len(self.marks) > 2 and now - self.marks[1][0] >= WINDOW:
            self.marks.popleft()
        begun, first = self.marks[0]
        return (step - first) / max(now - begun, 1e-9)


class TimeLeft:
    """An estimate. The stage that trains is measured (`Pace`). A step of a later one is taken to
    last longer than one of this stage as it has more FLOPs, and each evaluation to last as long as
    the longest of this run so far.

    Args:
        names: of all stages and filters of the run, in their order.
        ahead: those that have not finished, nor were taken from another run.
        step_flops: the FLOPs of an optimizer step of a stage on one device, with its accumulation.
    """

    def __init__(
        self, names: Sequence[str], ahead: Sequence[StageSettings | FilterSettings], run_dir: Path, step_flops: StepFlops
    ) -> None:
        self.names, self.ahead, self.run_dir, self.step_flops = list(names), list(ahead), run_dir, step_flops
        self.counted: dict[str, float | None] = {}  # FLOPs of a step by stage

    def place(self, name: str) -> str:
        """Which stage of how many one is, as "2/3"."""
        return f"{self.names.index(name) + 1}/{len(self.names)}"

    def told(self, name: str, steps: int, pace: float) -> str:
        """The time left in words, with what it leaves out.

        Args:
            name: of the stage that trains.
            steps: that it has still to do.
            pace: its optimizer steps a second.
        """
        if not pace:
            return ""
        left = [one.name for one in self.ahead]
        now, *later = self.ahead[left.index(name) :]
        left_out = []
        for one in later:
            share = self._as_steps_of(now, one)
            steps += round(share or 0.0)
            left_out += [one.name] if share is None else []
        seconds, measured = steps / pace, self._longest_evaluation()
        if measured:
            seconds += measured * sum(_is_evaluated(one) for one in (now, *later))
        what = "left in the run" if measured else "of training left in the run"
        return f"{about(seconds)} {what}" + (f", {' and '.join(left_out)} not counted" if left_out else "")

    def _as_steps_of(self, now: StageSettings | FilterSettings, later: StageSettings | FilterSettings) -> float | None:
        """The steps of a later stage in steps of the one that trains; None where that is not known."""
        both = [self._flops(one) for one in (now, later)]
        if both[0] is None or both[1] is None or isinstance(later, FilterSettings):
            return None
        return later.max_steps * both[1] / both[0]

    def _flops(self, settings: StageSettings | FilterSettings) -> float | None:
        if isinstance(settings, FilterSettings):
            return None
        if settings.name not in self.counted:
            self.counted[settings.name] = self.step_flops(settings)
        return self.counted[settings.name]

    def _longest_evaluation(self) -> float:
        """Seconds; 0 before the first one."""
        timing = read_json(self.run_dir / "timing.json", {})
        return max((float(stage.get("eval_seconds", 0.0)) for stage in timing.values()), default=0.0)


def _is_evaluated(settings: StageSettings | FilterSettings) -> bool:
    return isinstance(settings, StageSettings) and bool(settings.evaluation) and settings.data.measured_on is not None


def about(seconds: float) -> str:
    """A duration that is only estimated, in the unit that fits: "about 40 s", "about 3 min", "about 2.5 h"."""
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
