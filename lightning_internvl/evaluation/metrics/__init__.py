"""Metrics of the field on plain texts."""
