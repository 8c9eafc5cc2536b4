"""Losses as loops over rows, tokens and vocabulary, in Python floats, and batches that they are tried on."""

import math

import torch
from toys import ToyLM, toy_batch, toy_rows

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.halves import split
from soul_trainer.settings import ObjectiveArguments


SETTINGS = ObjectiveArguments(
    npo_beta=0.3,
    simnpo_beta=2.5,
    simnpo_margin=0.4,
    dpo_beta=0.2,
    wga_power=0.7,
    satimp_saturation=1.5,
    satimp_importance=0.5,
    undial_strength=3.0,
    rmu_layer=0,
    rmu_coefficient=5.0,
    rmu_seed=3,
)


class Row:
    """What a slow formula may read of a row, in lists: Python floats alone."""

    def __init__(self, batch, outputs, reference, index, preferred=None):
        self.labels = batch["labels"][index].tolist()
        self.scores, self.reference_scores = (each.logits[index].double().tolist() for each in (outputs, reference))
        self.hidden, self.reference_hidden = (
            each.hidden_states[1][index].double().tolist() for each in (outputs, reference)
        )
        self.reference_log_prob = float(batch["reference_log_prob"][index])
        self.preferred = preferred

    @property
    def places(self):
        """Pairs of the position whose logits predict an answer token, and the token."""
        return [(place - 1, label) for place, label in enumerate(self.labels) if place and label != IGNORE_INDEX]

    @property
    def token_log_probs(self):
        return [log_softmax(self.scores[t])[token] for t, token in self.places]


def log_softmax(scores):
    top = max(scores)
    log_total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - log_total for score in scores]


def slow_nll(row):
    return -sum(row.token_log_probs)


def slow_ga(row):
    return sum(row.token_log_probs)


def slow_wga(row):
    return sum(math.exp(value) ** 0.7 * value for value in row.token_log_probs)


def slow_satimp(row):
    return sum(math.exp(value) ** 1.5 * (1 - math.exp(value)) ** 0.5 * value for value in row.token_log_probs)


def slow_kl(row):
    total = 0.0
    for t, _ in row.places:
        for log_p, log_q in zip(log_softmax(row.scores[t]), log_softmax(row.reference_scores[t])):
            total += math.exp(log_q) * (log_q - log_p)
    return total


def slow_kl_away(row):
    total = 0.0
    for t, _ in row.places:
        for log_p, log_q in zip(log_softmax(row.scores[t]), log_softmax(row.reference_scores[t])):
            total += math.exp(log_p) * log_q
    return total


def slow_undial(row):
    total = 0.0
    for t, token in row.places:
        teacher = list(row.reference_scores[t])
        teacher[token] -= 3.0
        total -= sum(math.exp(log_q) * log_p for log_p, log_q in zip(log_softmax(row.scores[t]), log_softmax(teacher)))
    return total


def slow_ceu(row):
    total = 0.0
    for t, token in row.places:
        others = [score for place, score in enumerate(row.scores[t]) if place != token]
        log_p = [value for place, value in enumerate(log_softmax(row.scores[t])) if place != token]
        total -= sum(math.exp(log_q) * value for value, log_q in zip(log_p, log_softmax(others)))
    return total


def slow_pdu(row):
    return sum((max(row.scores[t]) - sum(row.scores[t]) / len(row.scores[t])) ** 2 for t, _ in row.places)


def slow_npo(row):
    ratio = math.exp(slow_ga(row) - row.reference_log_prob)
    return 2 / 0.3 * math.log(1 + ratio**0.3)


def slow_simnpo(row):
    mean = slow_ga(row) / len(row.places)
    return -2 / 2.5 * math.log(1 / (1 + math.exp(2.5 * mean + 0.4)))


def slow_dpo(row):
    margin = (slow_ga(row.preferred) - row.preferred.reference_log_prob) - (slow_ga(row) - row.reference_log_prob)
    return -2 / 0.2 * math.log(1 / (1 + math.exp(-0.2 * margin)))


def slow_rmu(row):
    draws = torch.rand(4, generator=torch.Generator().manual_seed(3)).double().tolist()
    length = math.sqrt(sum(draw**2 for draw in draws))
    target = [5.0 * draw / length for draw in draws]
    return sum(sum((a - b) ** 2 for a, b in zip(row.hidden[t], target)) / 4 for t, _ in row.places)


def slow_activations(row):
    return sum(sum((a - b) ** 2 for a, b in zip(row.hidden[t], row.reference_hidden[t])) / 4 for t, _ in row.places)


SLOW_FORGET = {
    "ga": slow_ga,
    "wga": slow_wga,
    "satimp": slow_satimp,
    "npo": slow_npo,
    "simnpo": slow_simnpo,
    "refusal": slow_nll,
    "random": slow_nll,
    "dpo": slow_dpo,
    "altpo": slow_dpo,
    "kl": slow_kl_away,
    "undial": slow_undial,
    "ceu": slow_ceu,
    "pdu": slow_pdu,
    "rmu": slow_rmu,
    "task_vector": slow_nll,
}
SLOW_RETAIN = {"nll": slow_nll, "kl": slow_kl, "activations": slow_activations}


def outputs_of(seed, batch):
    return ToyLM(seed)(batch["input_ids"], output_hidden_states=True)


def make_batch(num_forget=3, num_retain=4, with_preferred=True):
    """Forget and retain rows, and as many preferred ones as forget rows, all different."""
    num_preferred = num_forget if with_preferred else 0
    rows = toy_rows(num_forget + num_retain + num_preferred, seed=4)
    forget, retain, preferred = rows[:num_forget], rows[num_forget : num_forget + num_retain], rows[-num_preferred:]
    batch = toy_batch(forget, retain, preferred if num_preferred else [])
    batch["reference_log_prob"] = -torch.linspace(1, 9, len(rows))
    return batch


def halves_of(batch, seed=0, reference_seed=1):
    outputs, reference = outputs_of(seed, batch), outputs_of(reference_seed, batch)
    before = reference.logits.detach(), reference.hidden_states[1].detach()
    return split(batch, outputs.logits, outputs.hidden_states[1], *before)


def rows_of(batch, half):
    """The rows of a half for the slow formulas, those to forget with their preferred ones."""
    outputs, reference = outputs_of(0, batch), outputs_of(1, batch)
    num_forget = int(batch["is_forget"].sum())
    if half == 1:
        return [Row(batch, outputs, reference, place) for place in range(num_forget, num_forget + 4)]
    return [
        Row(batch, outputs, reference, place, Row(batch, outputs, reference, num_forget + 4 + place))
        for place in range(num_forget)
    ]


def widened(batch, columns):
    """The same batch with more padding, which holds a token of the vocabulary."""
    fill = {"input_ids": 3, "attention_mask": 0, "labels": IGNORE_INDEX}
    return {
        key: torch.nn.functional.pad(tensor, (0, columns), value=fill[key]) if key in fill else tensor
        for key, tensor in batch.items()
    }


def reordered(batch, forget_order, retain_order):
    num_forget, num_retain = len(forget_order), len(retain_order)
    order = forget_order + [num_forget + place for place in retain_order]
    order += [num_forget + num_retain + place for place in forget_order]
    return {key: tensor[order] for key, tensor in batch.items()}
