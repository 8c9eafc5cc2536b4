"""`evaluate` module of the model utility."""

import datasets
import evaluate

from .formula import model_utility


_DESCRIPTION = """\
Model utility is the harmonic mean of nine numbers: answer probability, ROUGE-L recall and truth-ratio score, each on
the retain rows, on real authors and on world facts. The harmonic mean stays near the weakest of them, so that no
strength makes up for something that was lost.
Range: [0, 1]. Higher is better; what the model had before unlearning is the goal.
"""
_CITATION = """\
@article{maini2024tofu,
    title = {{TOFU}: A Task of Fictitious Unlearning for {LLMs}},
    author = {Maini, Pratyush and Feng, Zhili and Schwarzschild, Avi and Lipton, Zachary C. and Kolter, J. Zico},
    journal = {arXiv:2401.06121},
    year = {2024},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[float]`): The nine numbers, in any order, each in [0, 1].
Returns:
    `model_utility` (`float`): Their harmonic mean; 0 if one of them is 0.
Examples:
    >>> metric = evaluate.load("eval/metrics/model_utility")
    >>> metric.compute(predictions=[0.5] * 9)
    {'model_utility': 0.5}
"""


class ModelUtility(evaluate.Metric):
    """`evaluate` module of the model utility. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=["https://arxiv.org/abs/2401.06121", "https://github.com/locuslab/tofu"],
        )

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"model_utility": model_utility(predictions)}
