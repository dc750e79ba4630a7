"""Fault injection: by seed, peers die, stop and lie at every step, and the survivor is audited.

`python -m kvlink.testing.faults --path host_shm --faults 1000 --seed 0` (or `make faults`).
A *party* is an endpoint with pools whose every byte is accounted for. One lives in a *lane* (a
process that survives hundreds of faults), the other in a process that a fault may kill. A
*scenario* is what a seed draws; a *verdict* is what the lane found.
"""
