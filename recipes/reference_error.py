"""
Measures what `reference="cached_topk"` leaves out: for so many tokens kept at each position, how much of the
reference's probability they hold, and how far KL divergence and UNDIAL's loss, and their gradients by the logits, are
from those of whole distributions, on answers of which another model was made to forget.

    python recipes/reference_error.py --target DIR --unlearned DIR --rows retain.jsonl
"""

import argparse
from collections.abc import Callable

import torch
from datasets import load_dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.collator import UnlearnCollator
from soul_trainer.divergences import TopTokens, WholeVocabulary, token_distillation, token_kl
from soul_trainer.formats import longest_row, prepare
from soul_trainer.log_probs import shift_labels
from soul_trainer.reference_rows import top_tokens


KEPT = (1, 4, 16, 64, 256)
UNDIAL_STRENGTH = 10.0
DIVERGENCES: dict[str, Callable[[Tensor, WholeVocabulary | TopTokens, Tensor], Tensor]] = {
    "KL": token_kl,
    "UNDIAL": lambda logits, reference, targets: token_distillation(logits, reference, targets, UNDIAL_STRENGTH),
}


def value_and_gradient(name: str, logits: Tensor, reference: WholeVocabulary | TopTokens, targets: Tensor):
    """The mean of a divergence over answer positions, and its gradient by the logits."""
    logits = logits.detach().requires_grad_()
    value = DIVERGENCES[name](logits, reference, targets).sum() / (targets != IGNORE_INDEX).sum()
    return float(value.detach()), torch.autograd.grad(value, logits)[0]


def errors(logits: Tensor, reference: Tensor, targets: Tensor, num_tokens: int) -> dict[str, float]:
    """
    What is lost where `num_tokens` are kept.

    Args:
        logits (`torch.FloatTensor` of shape `(rows, tokens, V)`): Of the model that is trained.
        reference (`torch.FloatTensor` of shape `(rows, tokens, V)`): Of the model before unlearning.
        targets (`torch.LongTensor` of shape `(rows, tokens)`): From [`~log_probs.shift_labels`].
        num_tokens (`int`): Tokens that are kept.

    Returns:
        `dict[str, float]`: `kept`, the share of probability that is kept; and for each divergence `<name>`, what it is
        with whole distributions, in nats a token, `<name> error`, how far it is from that, and `<name> gradient
        error`, the relative distance of the gradients.
    """
    top = top_tokens(reference, targets, num_tokens)
    found = {"kept": 1 - float(top.log_probs[targets != IGNORE_INDEX][:, -1].exp().mean())}
    for name in DIVERGENCES:
        whole, whole_gradient = value_and_gradient(name, logits, WholeVocabulary(reference), targets)
        value, gradient = value_and_gradient(name, logits, top, targets)
        found |= {name: whole, f"{name} error": value - whole}
        found[f"{name} gradient error"] = float((gradient - whole_gradient).norm() / whole_gradient.norm())
    return found


@torch.no_grad()
def logits_of(folder: str, batch: dict[str, Tensor]) -> Tensor:
    """Float32 logits of a model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits


def main(args: argparse.Namespace) -> None:
    """Prints the table."""
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    rows = load_dataset("json", data_files=args.rows, split="train")
    rows = rows.select(range(min(args.num_rows, len(rows))))
    model = AutoModelForCausalLM.from_pretrained(args.target, dtype="auto")
    prepared = prepare(rows, tokenizer, longest_row(None, model, tokenizer), name="rows")
    batch = UnlearnCollator.for_tokenizer(tokenizer)(prepared.to_list())
    logits, reference = (logits_of(folder, batch) for folder in (args.unlearned, args.target))
    targets = shift_labels(batch["labels"])
    print(f"{len(prepared)} rows, {int((targets != IGNORE_INDEX).sum())} positions, {logits.shape[2]} tokens\n")
    names = [f"{name}{what}" for name in DIVERGENCES for what in ("", " error", " gradient error")]
    print(f"| kept tokens | kept probability | {' | '.join(names)} |\n|---:|{'---:|' * (len(names) + 1)}")
    for num_tokens in (number for number in KEPT if number < logits.shape[2]):
        found = errors(logits, reference, targets, num_tokens)
        cells = [f"{found[name]:.4f}" if name in DIVERGENCES else f"{found[name]:.1e}" for name in names]
        print(f"| {num_tokens} | {found['kept']:.5f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True, help="the model before unlearning: folder or hub id")
    parser.add_argument("--unlearned", required=True, help="the model after it")
    parser.add_argument("--rows", required=True, help="JSON Lines of rows, of any kind that training takes")
    parser.add_argument("--num_rows", type=int, default=64, help="only the first (%(default)s)")
    main(parser.parse_args())
