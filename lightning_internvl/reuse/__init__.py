"""Stages that need not be trained, because another run has finished the same stage: what a stage
is made of, and taking one."""
