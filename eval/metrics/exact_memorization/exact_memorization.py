"""`evaluate` module of the exact memorization."""

import datasets
import evaluate

from .formula import exact_memorization


_DESCRIPTION = """\
Exact memorization is the share of an answer's tokens that are the model's most probable ones, given the question and
the true tokens before them. It needs no generation, and one early mistake does not spoil the rest.
Range: [0, 1]. On rows to forget lower is better, down to what a model has that never saw them; that is far above 0,
because much of any answer follows from grammar and from the question.
"""
_CITATION = """\
@inproceedings{tirumala2022memorization,
    title = {Memorization Without Overfitting: Analyzing the Training Dynamics of Large Language Models},
    author = {Tirumala, Kushal and Markosyan, Aram H. and Zettlemoyer, Luke and Aghajanyan, Armen},
    booktitle = {Advances in Neural Information Processing Systems},
    year = {2022},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[list[bool]]`): Of each row's answer tokens, whether they are the model's most probable ones.
Returns:
    `exact_memorization` (`float`): The mean over rows.
    `scores` (`list[float]`): Of each row.
Examples:
    >>> metric = evaluate.load("eval/metrics/exact_memorization")
    >>> metric.compute(predictions=[[True, False, True, True], [True]])
    {'exact_memorization': 0.875, 'scores': [0.75, 1.0]}
"""


class ExactMemorization(evaluate.Metric):
    """`evaluate` module of the exact memorization. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("bool"))}),
            reference_urls=["https://arxiv.org/abs/2205.10770", "https://github.com/locuslab/open-unlearning"],
        )

    def _compute(self, predictions: list[list[bool]]) -> dict[str, float | list[float]]:
        scores = exact_memorization(predictions)
        return {"exact_memorization": float(scores.mean()), "scores": scores.tolist()}
