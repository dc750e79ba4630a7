"""Mutated control frames into a live endpoint, while a good peer's transfers go on.

`python -m kvlink.testing.fuzz --frames 1000000 --seed 0` (or `make fuzz`).
"""
