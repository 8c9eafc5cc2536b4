"""
Forget losses and retain losses: pure functions in two tables by name. One line in a table adds one.

A loss gives one number a row, a *sum* over the row's answer tokens (or one number for its whole sequence); the trainer
divides the sum over rows by a global count of tokens (or of sequences), so that batch size, gradient accumulation and
the number of processes do not change the trajectory.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .divergences import token_cross_entropy, token_distillation, token_kl, token_margin, token_suppression
from .halves import Half
from .settings import ObjectiveArguments


@dataclass(frozen=True)
class Objective:
    """
    A loss and what it asks for.

    Args:
        function (`Callable`): `(Half, ObjectiveArguments) -> (R,)`, one sum a row.
        per (`str`, *optional*, defaults to `"token"`): The unit of the global count: `"token"` or `"sequence"`.
        settings (`tuple[str, ...]`, *optional*): The fields of [`~settings.ObjectiveArguments`] that it reads.
        answers (`str`, *optional*, defaults to `"own"`):
            Which answers the rows carry: `"own"`, `"refusal"`, `"random"` (those of retain rows) or `"alternate"`
            (the rows' column of this name).
        prefers_answers (`bool`, *optional*, defaults to `False`):
            Whether those answers come beside the rows' own, as `half.preferred`, rather than in their place.
        skipped_tokens (`int`, *optional*, defaults to 0): First tokens of an answer that have no loss.
        needs_reference (`bool`, *optional*, defaults to `False`): Whether it reads `reference`.
        needs_reference_log_prob (`bool`, *optional*, defaults to `False`): Whether it reads `reference_log_prob`.
        needs_hidden_states (`bool`, *optional*, defaults to `False`): Whether it reads `hidden_states`.
        needs_reference_hidden_states (`bool`, *optional*, defaults to `False`): Whether it reads those as well.
        is_negated (`bool`, *optional*, defaults to `False`):
            Whether the rows are learnt, and what was learnt is subtracted from the weights at the end.
    """

    function: Callable[[Half, ObjectiveArguments], Tensor]
    per: str = "token"
    settings: tuple[str, ...] = ()
    answers: str = "own"
    prefers_answers: bool = False
    skipped_tokens: int = 0
    needs_reference: bool = False
    needs_reference_log_prob: bool = False
    needs_hidden_states: bool = False
    needs_reference_hidden_states: bool = False
    is_negated: bool = False

    def __call__(self, half: Half, settings: ObjectiveArguments) -> Tensor:
        """The loss of each row, `(R,)`: zero where a row has no answer token, as those that fill a batch up."""
        has_answer = half.is_answer.any(1)
        return torch.where(has_answer, self.function(half, settings), 0.0)


def nll(half: Half, settings: ObjectiveArguments) -> Tensor:
    """Negative log-likelihood, nats summed over the answer: `-sum_t log p(y_t)`."""
    return -half.log_probs.sum(1)


def gradient_ascent(half: Half, settings: ObjectiveArguments) -> Tensor:
    """Gradient ascent on the likelihood loss (GA; Jang et al., 2023): `sum_t log p(y_t)`."""
    return half.log_probs.sum(1)


def weighted_gradient_ascent(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Weighted gradient ascent (WGA; Wang et al., 2025, arXiv 2502.19301): `sum_t p(y_t)^beta log p(y_t)`, the weight a
    constant, so that tokens that are forgotten already are left alone.
    """
    weight = half.log_probs.detach().exp() ** settings.wga_power
    return (weight * half.log_probs).sum(1)


def saturation_importance(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    SatImp (Yang et al., 2025, arXiv 2505.11953): `sum_t p(y_t)^beta1 (1 - p(y_t))^beta2 log p(y_t)`, the weight a
    constant.
    """
    p = half.log_probs.detach().exp()
    weight = p**settings.satimp_saturation * (1 - p).clamp_min(0) ** settings.satimp_importance
    return (weight * half.log_probs).sum(1)


def kl(half: Half, settings: ObjectiveArguments) -> Tensor:
    """`sum_t KL(reference || model)` over answer positions (KL minimization of TOFU, Maini et al., 2024)."""
    return token_kl(half.logits, half.reference, half.targets).sum(1)


def kl_away(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Drives the distribution away from what it was, as the released SOUL code does: `sum_t sum_v p(v) log p_ref(v)`.

    The negative of [`kl`] would be stuck: the model starts as its own reference, where KL has no gradient.
    """
    return -token_cross_entropy(half.logits, half.reference, half.targets).sum(1)


def undial(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Unlearning by self-distillation (UNDIAL; Dong et al., 2024, arXiv 2402.10052): `-sum_t sum_v q(v) log p(v)` with
    `q = softmax(reference logits - beta onehot(y_t))`.
    """
    return token_distillation(half.logits, half.reference, half.targets, settings.undial_strength).sum(1)


def cross_entropy_unlearning(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Cross-entropy unlearning (CE-U; Yang, 2025, arXiv 2503.01224): `-sum_t sum_v q(v) log p(v)` with q the model's own
    distribution, as a constant, after the logit of `y_t` is set to minus infinity.
    """
    return token_suppression(half.logits, half.targets).sum(1)


def logit_margin(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Logit-margin flattening of PDU (Entesari et al., 2025, arXiv 2506.05314): `sum_t (max_v z_v - mean_v z_v)^2`, z
    the logits.
    """
    return token_margin(half.logits, half.targets).sum(1)


def npo(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Negative preference optimization (Zhang et al., 2024, arXiv 2404.05868, eq. 3), per sequence:
    `-(2 / beta) log sigmoid(-beta log(p(y) / p_reference(y)))`. Its gradient tends to gradient ascent's as beta -> 0.
    """
    log_ratio = half.log_probs.sum(1) - half.reference_log_prob
    return softplus(settings.npo_beta * log_ratio) * (2 / settings.npo_beta)


def simnpo(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Simple NPO (Fan et al., 2024, arXiv 2410.07163, eq. 4), per sequence: `-(2 / beta) log sigmoid(-(beta / |y|) log
    p(y) - gamma)`. It needs no reference.
    """
    mean_log_prob = half.log_probs.sum(1) / half.is_answer.sum(1).clamp_min(1)
    return softplus(settings.simnpo_beta * mean_log_prob + settings.simnpo_margin) * (2 / settings.simnpo_beta)


def dpo(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Direct preference optimization (Rafailov et al., 2023, arXiv 2305.18290, eq. 7) of another answer over the row's
    own, per sequence, with the factor 2 / beta of TOFU and AltPO (arXiv 2409.13474): `-(2 / beta) log sigmoid(beta
    log(p(y') / p_reference(y')) - beta log(p(y) / p_reference(y)))`.
    """
    own, preferred = (part.log_probs.sum(1) - part.reference_log_prob for part in (half, half.preferred))
    return softplus(settings.dpo_beta * (own - preferred)) * (2 / settings.dpo_beta)


def misdirection(half: Half, settings: ObjectiveArguments) -> Tensor:
    """
    Representation misdirection (RMU; Li et al., 2024, arXiv 2403.03218, eq. 1): `sum_t ||a_t - c u||^2 / D`, a the
    activations after a layer and u a random direction.
    """
    width = half.hidden_states.shape[-1]
    target = settings.rmu_coefficient * _direction(width, settings.rmu_seed).to(half.hidden_states.device)
    return _mean_square(half.hidden_states.float() - target, half)


def activations(half: Half, settings: ObjectiveArguments) -> Tensor:
    """What RMU keeps (Li et al., 2024, eq. 2): `sum_t ||a_t - a_t before unlearning||^2 / D`, after the same layer."""
    return _mean_square(half.hidden_states.float() - half.reference_hidden_states.float(), half)


def _mean_square(differences: Tensor, half: Half) -> Tensor:
    return torch.where(half.is_answer, differences.square().mean(-1), 0.0).sum(1)


@lru_cache(maxsize=4)
def _direction(width: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), scaled to length 1, as in the released RMU code."""
    vector = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


_RMU = ("rmu_layer", "rmu_coefficient", "rmu_seed")
_PREFERENCE = {"per": "sequence", "settings": ("dpo_beta",), "needs_reference_log_prob": True, "prefers_answers": True}

FORGET_LOSSES: dict[str, Objective | None] = {
    "ga": Objective(gradient_ascent),
    "wga": Objective(weighted_gradient_ascent, settings=("wga_power",)),
    "satimp": Objective(saturation_importance, settings=("satimp_saturation", "satimp_importance")),
    "npo": Objective(npo, per="sequence", settings=("npo_beta",), needs_reference_log_prob=True),
    "simnpo": Objective(simnpo, per="sequence", settings=("simnpo_beta", "simnpo_margin")),
    "refusal": Objective(nll, answers="refusal"),
    "random": Objective(nll, answers="random"),
    "dpo": Objective(dpo, answers="refusal", **_PREFERENCE),
    "altpo": Objective(dpo, answers="alternate", **_PREFERENCE),
    "kl": Objective(kl_away, needs_reference=True),
    "undial": Objective(undial, settings=("undial_strength",), needs_reference=True),
    "ceu": Objective(cross_entropy_unlearning, skipped_tokens=1),
    "pdu": Objective(logit_margin),
    "rmu": Objective(misdirection, settings=_RMU, needs_hidden_states=True),
    "task_vector": Objective(nll, settings=("task_vector_scale",), is_negated=True),
    "none": None,
}

RETAIN_LOSSES: dict[str, Objective | None] = {
    "nll": Objective(nll),
    "kl": Objective(kl, needs_reference=True),
    "activations": Objective(
        activations, settings=("rmu_layer",), needs_hidden_states=True, needs_reference_hidden_states=True
    ),
    "curvature": None,
    "none": None,
}


class Objectives(NamedTuple):
    """
    What a run minimizes.

    Attributes:
        forget ([`Objective`], *optional*): On the rows to forget.
        retain ([`Objective`], *optional*): On the rows to retain.
    """

    forget: Objective | None
    retain: Objective | None

    @classmethod
    def named(cls, forget_loss: str, retain_loss: str) -> "Objectives":
        """Those of two names in the tables."""
        return cls(FORGET_LOSSES[forget_loss], RETAIN_LOSSES[retain_loss])

    def any(self, field: str) -> bool:
        """Whether a field of one of them is set."""
        return any(getattr(objective, field) for objective in self if objective is not None)

    @property
    def look_back(self) -> bool:
        """Whether they compare the model with what it was before unlearning."""
        fields = ("needs_reference", "needs_reference_log_prob", "needs_reference_hidden_states", "is_negated")
        return any(self.any(field) for field in fields)


def l1_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Sum of absolute values of the trainable parameters (l1-sparse; Jia et al., 2023, arXiv 2304.04934)."""
    return sum(torch.linalg.vector_norm(p, ord=1, dtype=torch.float32) for p in parameters if p.requires_grad)


def parameters_of_layers(layer: int) -> str:
    """
    The parameters that RMU trains, as published: the down projections of the MLPs of a layer and the two before it.

    Returns:
        `str`: A regular expression for their names in the decoder families of transformers.
    """
    layers = "|".join(str(number) for number in range(max(layer - 2, 0), layer + 1))
    return rf"\.({layers})\.((mlp|block_sparse_moe)\.(.*\.)?(down_proj|c_proj|dense_4h_to_h|fc2|w2)|fc2)(\.weight)?$"


def check_one_stack(names: Iterable[str], layer: int) -> None:
    """
    Checks that the parameters that RMU trains by default are of one stack of layers.

    Args:
        names (`Iterable[str]`): Of the parameters that [`parameters_of_layers`] found.
        layer (`int`): As it was given there.

    Raises:
        ValueError: If a model has several stacks, of which only one writes the text.
    """
    pattern = re.compile(parameters_of_layers(layer))
    stacks = dict.fromkeys(name[: found.start()] for name in names if (found := pattern.search(name)))
    if len(stacks) > 1:
        raise ValueError(
            "forget_loss='rmu' trains layers of the language model, but the model has "
            f"{len(stacks)} stacks of layers: {', '.join(stacks)}. Name the parameters in `trainable_parameters`."
        )
