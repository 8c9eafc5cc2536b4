"""`evaluate` module of the forget quality."""

import datasets
import evaluate

from .formula import forget_quality


_DESCRIPTION = """\
Forget quality is the p-value of a two-sample Kolmogorov-Smirnov test between the truth ratios of the unlearned model
and those of a gold model, which was trained without the forget rows. It asks whether the two models can be told apart
by how they weigh true answers against false ones.
Range: [0, 1]. Higher is better: above 0.05 the test cannot tell the unlearned model from the gold one; far below, it
can, be it that the model still knows or that it has unlearned too much. The p-value falls with the number of rows, so
compare it on the same rows only. The statistic, in [0, 1], lower is better, is the largest distance between the
distributions.
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
    predictions (`list[float]`): Truth ratios of the unlearned model, one a forget row.
    references (`list[float]`): Truth ratios of the gold model on the same rows.
Returns:
    `forget_quality` (`float`): The p-value.
    `ks_statistic` (`float`): The statistic.
Examples:
    >>> metric = evaluate.load("eval/metrics/forget_quality")
    >>> metric.compute(predictions=[0.5, 0.9, 1.1], references=[0.5, 0.9, 1.1])
    {'forget_quality': 1.0, 'ks_statistic': 0.0}
"""


class ForgetQuality(evaluate.Metric):
    """`evaluate` module of the forget quality. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/2401.06121", "https://github.com/locuslab/tofu"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        p_value, statistic = forget_quality(predictions, references)
        return {"forget_quality": p_value, "ks_statistic": statistic}
