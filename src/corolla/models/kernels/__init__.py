"""Faster products for frozen weights on a CPU; `apply.py` puts them into a model."""
