"""`evaluate` module of the truth ratio."""

import datasets
import evaluate

from .formula import log_truth_ratios, truth_ratio_score, truth_ratios, truth_shares


_DESCRIPTION = """\
The truth ratio of a row compares false answers with a true one that is worded like them: `R = exp(paraphrased_nll -
mean(perturbed_nll))`, the geometric mean of the false answers' probabilities over the true one's. A model that knows
the answer has R well below 1; one that never saw it has R near 1. Unlike a probability, R does not fall just because
a model has become unable to say anything.
Its score is `mean(min(R, 1 / R))` on the forget side and `mean(max(0, 1 - R))` on the retain side.
The share is `mean(1 / (1 + R))`, which is true / (true + false) on either side.
Range: R in (0, infinity), scores in [0, 1]. Higher scores are better; on the forget side a gold model's score is the
goal.
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
    predictions (`list[float]`): Mean negative log-likelihood per token of each paraphrased true answer, in nats.
    references (`list[list[float]]`): The same of each row's false answers.
    side (`str`, *optional*, defaults to `"forget"`): Which score: `"forget"` or `"retain"`.
Returns:
    `truth_ratios` (`list[float]`): One a row.
    `truth_ratio` (`float`): The score.
    `truth_share` (`float`): Mean of `true / (true + false)`, which is `1 / (1 + R)`.
Examples:
    >>> metric = evaluate.load("eval/metrics/truth_ratio")
    >>> metric.compute(predictions=[1.0, 2.0], references=[[1.0, 1.0], [1.0, 3.0]])
    {'truth_ratios': [1.0, 1.0], 'truth_ratio': 1.0, 'truth_share': 0.5}
"""


class TruthRatio(evaluate.Metric):
    """`evaluate` module of the truth ratio. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.List(datasets.Value("float64")),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2401.06121", "https://github.com/locuslab/tofu"],
        )

    def _compute(
        self, predictions: list[float], references: list[list[float]], side: str = "forget"
    ) -> dict[str, list[float] | float]:
        log_ratios = log_truth_ratios(predictions, references)
        return {
            "truth_ratios": truth_ratios(predictions, references).tolist(),
            "truth_ratio": truth_ratio_score(log_ratios, side),
            "truth_share": float(truth_shares(log_ratios).mean()),
        }
