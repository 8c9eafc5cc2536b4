"""
The optimizer, on torch alone: it knows neither Trainer nor engine, and any loop can use it.

| file | what |
|---|---|
| `optimizer.py` | `Soul`: momenta, decay, state, and the steps that move nothing |
| `rules.py` | what becomes of a momentum before it is a step: one table of rules |
| `scaling.py` | how long a step is: one table of scalings |
| `sophia.py` | `Sophia`, the published optimizer: one rule, one momentum |
| `states.py` | the states of parameters, and what gradients add to them |
| `updates.py` | what buckets of parameters are moved by |
| `partition.py` | whose tensors the parameters hold, where they are sharded or flat |
| `checks.py` | the ranges of settings |
"""

from .optimizer import Soul
from .partition import Partition, Section
from .rules import RULES
from .scaling import SCALINGS
from .sophia import Sophia


__all__ = ["RULES", "SCALINGS", "Partition", "Section", "Sophia", "Soul"]
