"""Losses, each alone and testable alone; those with parameters of their own keep them here."""

from lightning_internvl.objectives.classification import Classification
from lightning_internvl.objectives.embedding import EmbeddingContrast
from lightning_internvl.objectives.grpo import GRPO
from lightning_internvl.objectives.itc import ITC, WordITC
from lightning_internvl.objectives.itm import ITM, mined_negatives, other_pictures, random_negatives
from lightning_internvl.objectives.next_token import NextToken
from lightning_internvl.objectives.preference import DPO, KTO, MPO, ORPO, Pairs, Preference, SimPO
from lightning_internvl.objectives.query_itc import QueryITC, similarities
from lightning_internvl.objectives.siglip import SigLIP

__all__ = [
    "DPO",
    "GRPO",
    "ITC",
    "ITM",
    "KTO",
    "MPO",
    "ORPO",
    "Classification",
    "EmbeddingContrast",
    "NextToken",
    "Pairs",
    "Preference",
    "QueryITC",
    "SigLIP",
    "SimPO",
    "WordITC",
    "mined_negatives",
    "other_pictures",
    "random_negatives",
    "similarities",
]
