"""Measurements of Corolla, each beside its baseline in the same run; see `benchmarks/run.py`."""
