"""`evaluate` module of the scores of membership inference attacks."""

import datasets
import evaluate

from .formula import DEFAULT_SHARE, membership_scores


_DESCRIPTION = """\
What seven membership inference attacks make of each row: loss, zlib, Min-K%, Min-K%++, reference-calibrated, lowercase
and gradient norm. Every score is higher where a row is more likely to have been trained on. They have no range in
common: rows are compared with rows, by `membership_auc`.
"""
_CITATION = """\
@inproceedings{shi2024detecting,
    title = {Detecting Pretraining Data from Large Language Models},
    author = {Shi, Weijia and Ajith, Anirudh and Xia, Mengzhou and Huang, Yangsibo and Liu, Daogao and Blevins, Terra
        and Chen, Danqi and Zettlemoyer, Luke},
    booktitle = {ICLR},
    year = {2024},
}
@article{zhang2024minkpp,
    title = {Min-K\\%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models},
    author = {Zhang, Jingyang and Sun, Jingwei and Yeats, Eric and Ouyang, Yang and Kuo, Martin and Zhang, Jianyi and
        Yang, Hao Frank and Li, Hai},
    journal = {arXiv:2404.02936},
    year = {2024},
}
@inproceedings{carlini2021extracting,
    title = {Extracting Training Data from Large Language Models},
    author = {Carlini, Nicholas and others},
    booktitle = {USENIX Security Symposium},
    year = {2021},
}
"""

_INPUTS_DESCRIPTION = """\
Args:
    predictions (`list[list[float]]`): Log-probability of each token of each row, in nats.
    token_z_scores (`list[list[float]]`, *optional*): `(log p(token) - mean) / std` of each token, for Min-K%++.
    texts (`list[str]`, *optional*): The rows' texts, for zlib.
    reference_nll (`list[float]`, *optional*): Mean loss per token of a reference model.
    lowercase_nll (`list[float]`, *optional*): Mean loss per token of the text in lower case.
    gradient_norms (`list[float]`, *optional*): Norm of the gradient of each row's loss.
    k (`float`, *optional*, defaults to 0.2): Share of the tokens that Min-K% and Min-K%++ look at.
Returns:
    `loss`, `min_k` (`list[float]`): And `min_k_plus_plus`, `zlib`, `reference`, `lowercase`, `gradient_norm` where
    their inputs are given. One score a row.
Examples:
    >>> metric = evaluate.load("eval/metrics/membership_scores")
    >>> metric.compute(predictions=[[-1.0, -3.0]], k=0.5)
    {'min_k': [-3.0], 'loss': [-2.0]}
"""


class MembershipScores(evaluate.Metric):
    """`evaluate` module of the scores of membership inference attacks. See the card in README.md."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.List(datasets.Value("float64"))}),
            reference_urls=[
                "https://arxiv.org/abs/2310.16789",
                "https://arxiv.org/abs/2404.02936",
                "https://arxiv.org/abs/2012.07805",
            ],
        )

    def _compute(
        self,
        predictions: list[list[float]],
        token_z_scores: list[list[float]] | None = None,
        texts: list[str] | None = None,
        reference_nll: list[float] | None = None,
        lowercase_nll: list[float] | None = None,
        gradient_norms: list[float] | None = None,
        k: float = DEFAULT_SHARE,
    ) -> dict[str, list[float]]:
        scores = membership_scores(predictions, token_z_scores, texts, reference_nll, lowercase_nll, gradient_norms, k)
        return {name: values.tolist() for name, values in scores.items()}
