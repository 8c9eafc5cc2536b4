"""One folder a metric: `formula.py` holds the formula, the module beside it offers it to `evaluate.load`."""
