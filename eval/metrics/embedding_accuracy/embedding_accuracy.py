"""`evaluate` module of the accuracy by nearest sentence embedding."""

import datasets
import evaluate

from .formula import embedding_hits


_DESCRIPTION = """\
The share of generations whose sentence embedding is nearer (cosine) to the true answer's than to any wrong answer's.
Unlike ROUGE it does not care about the wording; unlike the probabilities it judges what the model says.
Range: [0, 1]. On rows to retain higher is better; on rows to forget lower, down to what a model has that never saw
them. With k wrong answers, chance is 1 / (k + 1).
"""
_CITATION = """\
@inproceedings{jia2024soul,
    title = {{SOUL}: Unlocking the Power of Second-Order Optimization for {LLM} Unlearning},
    author = {Jia, Jinghan and Zhang, Yihua and Zhang, Yimeng and Liu, Jiancheng and Runwal, Bharat and others},
    booktitle = {Proceedings of EMNLP},
    year = {2024},
}
@inproceedings{reimers2019sentence,
    title = {{Sentence-BERT}: Sentence Embeddings using {Siamese} {BERT}-Networks},
    author = {Reimers, Nils and Gurevych, Iryna},
    booktitle = {Proceedings of EMNLP},
    year = {2019},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[list[float]]`): Embedding of each generation.
    references (`list[list[list[float]]]`): Embeddings of each row's options, the true answer first.
Returns:
    `embedding_accuracy` (`float`): The share of hits.
    `hits` (`list[bool]`): Of each row.
Examples:
    >>> metric = evaluate.load("eval/metrics/embedding_accuracy")
    >>> metric.compute(predictions=[[2.0, 1.0], [1.0, 2.0]], references=[[[1.0, 0.0], [0.0, 1.0]]] * 2)
    {'embedding_accuracy': 0.5, 'hits': [True, False]}
"""


class EmbeddingAccuracy(evaluate.Metric):
    """`evaluate` module of the accuracy by nearest embedding. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "references": datasets.List(datasets.List(datasets.Value("float64"))),
                }
            ),
            reference_urls=["https://arxiv.org/abs/2404.18239", "https://github.com/OPTML-Group/SOUL"],
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[list[float]]]
    ) -> dict[str, float | list[bool]]:
        hits = embedding_hits(predictions, references)
        return {"embedding_accuracy": float(hits.mean()), "hits": hits.tolist()}
