"""
A study of many runs: which family of optimizers forgets at the least cost, on which objective and task.

| file | what |
|---|---|
| `records.py` | runs, one JSON line each |
| `figures.py` | what a run keeps at a given forgetting, the best setting for it, differences by seed |
| `summary.py` | one row for every task, objective and family; verdicts on two families |
| `tables.py` | the rows in Markdown |
| `drawing.py` | held-out against forget probability in the course of training |

A family's setting is chosen for each level of forgetting on the seeds of the search, and its figures are made of other
seeds. A run counts by the best model on its way that has forgotten enough, not by the first. Imports no torch.
"""
