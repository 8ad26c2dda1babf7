"""Gnomon beside TRL on the same work: `python -m benchmarks.peers`. docs/benchmarks.md says what is measured.

workloads.py ─► rows, in the order in which both train them
     │
     ▼                                  one process of its own each, never both at once, A B A B ...
__main__.py ─► measure.py ─┬─► gnomon_side.py   the command `gnomon run`, read from its metrics and events
                           └─► trl_side.py      a TRL trainer with a callback that takes the time
     │
     ▼
tables.py, flops.py: medians, spreads, ratios of pairs, share of the matmul peak
"""
