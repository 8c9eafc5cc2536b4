"""Evaluation of unlearned models: rows from a model, figures from rows, a report from figures."""
