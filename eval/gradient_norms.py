"""How strongly a model would still learn from a row: the input of the gradient-norm attack."""

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from soul_trainer.batch import IGNORE_INDEX
from soul_trainer.formats import Example, encode
from soul_trainer.log_probs import shift_labels, token_log_probs
from soul_trainer.reference import eval_mode


def gradient_norms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    progress: bool = True,
    max_length: int | None = None,
) -> list[float]:
    """
    Euclidean norm of the gradient of each row's loss, over all trainable parameters together.

    The loss is the mean over answer tokens, without dropout. Rows are taken one at a time, with a gradient of the size
    of the trainable parameters in memory. Nothing of the model changes: gradients that it has are neither read nor
    added to, and modules keep their modes.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A causal language model that no engine has sharded. Of one with adapters the adapter counts alone, as the
            rest is frozen; compare norms of models only where the same parameters are trainable.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The model's tokenizer.
        examples (`list[Example]`): From `soul_trainer.formats.render`.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar.
        max_length (`int`, *optional*): Tokens beyond are cut off. By default none is.

    Returns:
        `list[float]`: In nats per unit of a parameter, in the order of `examples`.

    Raises:
        ValueError: If every parameter is frozen, so that there is no gradient, or a row has no answer token.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if not weights:
        raise ValueError(
            "Every parameter of the model is frozen, so that no loss has a gradient. Load an adapter with "
            "`is_trainable=True`, or call `model.requires_grad_(True)` first."
        )
    norms = []
    with eval_mode(model), torch.enable_grad():
        for index, example in enumerate(tqdm(examples, desc="Gradient norms", unit="row", disable=not progress)):
            try:
                row = encode(tokenizer, example, max_length)
            except ValueError as error:
                raise ValueError(f"Row {index}: {error}") from error
            input_ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
            targets = shift_labels(labels)
            log_probs = token_log_probs(model(input_ids=input_ids, use_cache=False).logits, targets)
            loss = -log_probs.sum() / (targets != IGNORE_INDEX).sum()
            # A parameter that the row does not reach has no gradient: an expert that no token goes to.
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            norms.append(_norm([gradient for gradient in gradients if gradient is not None]))
    return norms


def _norm(gradients: list[torch.Tensor]) -> float:
    # Squares of half-precision numbers would overflow, and their sum would stop growing.
    dtypes = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    parts = [torch.linalg.vector_norm(gradient, dtype=dtype) for gradient, dtype in zip(gradients, dtypes)]
    return float(torch.stack([part.double().to(parts[0].device) for part in parts]).norm())
