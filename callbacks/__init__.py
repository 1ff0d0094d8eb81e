"""What a run shows, saves and measures. Without these callbacks the mathematics of a stage is the
same, but for the freezing."""

from callbacks.checkpoint import Checkpoint
from callbacks.evaluation import Evaluation
from callbacks.freezing import Freezing
from callbacks.guard import Guard
from callbacks.handoff import HandOff
from callbacks.history import HistoryLogger
from callbacks.loggers import CsvLogger, MlflowRun, WandbRun
from callbacks.progress import Progress
from callbacks.report import Report
from callbacks.samples import Samples
from callbacks.throughput import Throughput
from callbacks.tracking import Tracking
from callbacks.validation import Validation

__all__ = [
    "Checkpoint", "CsvLogger", "Evaluation", "Freezing", "Guard", "HandOff", "HistoryLogger",
    "MlflowRun", "Progress", "Report", "Samples", "Throughput", "Tracking", "Validation",
    "WandbRun",
]  # fmt: skip
