"""`plan=true`: what a run would need (parameters, FLOPs, memory), found on the meta device without
training anything."""

from lightning_internvl.plan.command import run_plan

__all__ = ["run_plan"]
