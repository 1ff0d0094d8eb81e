"""`doctor=true`: silent failures of each stage, looked for on a few of its own samples before a
long run is paid for."""

from lightning_internvl.doctor.command import run_doctor

__all__ = ["run_doctor"]
