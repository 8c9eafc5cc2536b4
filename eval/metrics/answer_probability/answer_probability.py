"""`evaluate` module of the answer probability."""

import datasets
import evaluate

from .formula import answer_probability, normalised_answer_probability


_DESCRIPTION = """\
Mean probability of the true answers. An answer's probability is the geometric mean of its tokens' probabilities, so
that long answers are not at a disadvantage: `p = exp(-nll)`, with `nll` its mean loss per token, end of sequence
included.
Given wrong answers too, it is the probability among the options of a row: `p / (p + sum(p_k))`.
Range: [0, 1]. On rows to retain higher is better; on rows to forget lower, down to what a model has that never saw
them.
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
    predictions (`list[float]`): Mean negative log-likelihood per token of each true answer, in nats.
    references (`list[list[float]]`, *optional*): The same of each row's wrong answers. Given, the result is normalised
        over the options, as TOFU does it on real authors and world facts.
Returns:
    `answer_probability` (`float`): The mean over rows.
Examples:
    >>> metric = evaluate.load("eval/metrics/answer_probability")
    >>> metric.compute(predictions=[0.0, 0.0])
    {'answer_probability': 1.0}
    >>> metric.compute(predictions=[2.0], references=[[2.0, 2.0, 2.0]])
    {'answer_probability': 0.25}
"""


class AnswerProbability(evaluate.Metric):
    """`evaluate` module of the answer probability. See the card in README.md."""

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

    def add_batch(self, *, predictions=None, references=None, **kwargs) -> None:
        """Adds rows; without `references` they have no wrong answers."""
        references = [[] for _ in predictions] if references is None else references
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(self, predictions: list[float], references: list[list[float]]) -> dict[str, float]:
        if any(references):
            return {"answer_probability": normalised_answer_probability(predictions, references)}
        return {"answer_probability": answer_probability(predictions)}
