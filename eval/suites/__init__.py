"""One file a benchmark: which rows, which metrics."""
