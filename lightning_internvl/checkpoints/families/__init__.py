"""Configurations that several official layouts share, by family of parts."""
