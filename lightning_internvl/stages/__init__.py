"""The alignment stages, one LightningModule each."""

from lightning_internvl.stages.base import Stage
from lightning_internvl.stages.contrastive import ContrastiveStage
from lightning_internvl.stages.embedding import EmbeddingStage
from lightning_internvl.stages.generative import GenerativeStage
from lightning_internvl.stages.preference import PreferenceStage
from lightning_internvl.stages.retrieval import RetrievalStage
from lightning_internvl.stages.reward import RewardStage
from lightning_internvl.stages.supervised import ProbeStage, SupervisedStage
from lightning_internvl.stages.transplant import TransplantStage
from lightning_internvl.stages.transplant_decoder import DecoderTransplantStage
from lightning_internvl.stages.word_alignment import WordStage

__all__ = [
    "ContrastiveStage",
    "DecoderTransplantStage",
    "EmbeddingStage",
    "GenerativeStage",
    "PreferenceStage",
    "ProbeStage",
    "RetrievalStage",
    "RewardStage",
    "Stage",
    "SupervisedStage",
    "TransplantStage",
    "WordStage",
]
