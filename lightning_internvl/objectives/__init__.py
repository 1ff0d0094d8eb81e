"""Losses, each alone and testable alone; those with parameters of their own keep them here."""

from lightning_internvl.objectives.itc import ITC
from lightning_internvl.objectives.itm import ITM, mined_negatives, random_negatives
from lightning_internvl.objectives.next_token import NextToken

__all__ = ["ITC", "ITM", "NextToken", "mined_negatives", "random_negatives"]
