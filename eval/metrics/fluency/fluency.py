"""`evaluate` module of the fluency of generations."""

import datasets
import evaluate

from .formula import fluency


_DESCRIPTION = """\
Whether generations are language at all: the mean probability that a gibberish classifier gives to "clean". A model
that unlearning has wrecked repeats itself or says noise, and then neither toxic nor known answers prove anything.
Range: [0, 1]. Higher is better; what the model had before unlearning is the goal.
"""
_CITATION = """\
@article{dorna2025openunlearning,
    title = {{OpenUnlearning}: Accelerating {LLM} Unlearning via Unified Benchmarking of Methods and Metrics},
    author = {Dorna, Vineeth and Mekala, Anmol and Zhao, Wenlong and McCallum, Andrew and Lipton, Zachary C. and
              Kolter, J. Zico and Maini, Pratyush},
    journal = {arXiv:2506.12618},
    year = {2025},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[float]`): Probability of "clean" of each generation, in [0, 1].
Returns:
    `fluency` (`float`): Their mean.
Examples:
    >>> metric = evaluate.load("eval/metrics/fluency")
    >>> metric.compute(predictions=[1.0, 0.5])
    {'fluency': 0.75}
"""


class Fluency(evaluate.Metric):
    """`evaluate` module of the fluency. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("float64")}),
            reference_urls=[
                "https://arxiv.org/abs/2506.12618",
                "https://huggingface.co/madhurjindal/autonlp-Gibberish-Detector-492513457",
            ],
        )

    def _compute(self, predictions: list[float]) -> dict[str, float]:
        return {"fluency": fluency(predictions)}
