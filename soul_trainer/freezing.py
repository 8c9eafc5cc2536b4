"""Which parameters train, chosen by their names: RMU's three matrices, everything but the embeddings, one block."""

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Names that an error lists of those there are.
_LISTED = 5


def freeze_what_text_does_not_reach(model: torch.nn.Module) -> list[str]:
    """
    Freezes what a model of several parts has besides its language model, as a vision tower: rows of text give it no
    gradient, and what does not ask for one, such as an L1 penalty, must not change it. Must come before
    [`freeze_parameters`].

    Args:
        model (`torch.nn.Module`): The unwrapped model; with an adapter, if there is one.

    Returns:
        `list[str]`: Names of the parameters that trained before and no longer do, in the model's order.
    """
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.config.get_text_config() is inner.config:
        return []
    parts = (inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings())
    reached = {parameter for part in parts for parameter in part.parameters()}
    names = []
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad and parameter not in reached:
            parameter.requires_grad_(False)
            names.append(name)
    return names


def freeze_parameters(
    model: torch.nn.Module, trainable: str | Sequence[str] | None = None, frozen: str | Sequence[str] | None = None
) -> list[str]:
    """
    Freezes the parameters that `trainable` leaves out or `frozen` names. It only takes away: a parameter that did not
    train before, as those below an adapter, stays as it is. Must come before an engine or an optimizer takes the
    model.

    Args:
        model (`torch.nn.Module`): The unwrapped model; with an adapter, if there is one.
        trainable (`str` or `Sequence[str]`, *optional*):
            Regular expressions; a parameter trains if one of them is found anywhere in its name (`re.search`, so that
            `layers.1` is also in `layers.10`: write `layers\\.1\\.`). By default all do.
        frozen (`str` or `Sequence[str]`, *optional*):
            Regular expressions; a parameter in whose name one of them is found does not train, even if `trainable`
            names it. A tensor of several names, as a head that is tied to the embeddings, answers to each of them.

    Returns:
        `list[str]`: Names of the parameters that train, in the model's order.

    Raises:
        ValueError:
            If an expression cannot be read or is found in no parameter that trains (some names are listed), or if
            nothing trains or is left to train.
    """
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    if not names:
        raise ValueError(
            "The model has no parameter that trains: set `requires_grad`, or load an adapter with `is_trainable=True`."
        )
    chosen = _named(names, "trainable_parameters", trainable) if trainable else set(names)
    chosen -= _named(names, "frozen_parameters", frozen) if frozen else set()
    if not chosen:
        raise ValueError(
            f"`trainable_parameters`={trainable!r} and `frozen_parameters`={frozen!r} leave nothing to train of "
            f"{_some(names)}: name less in `frozen_parameters`."
        )
    for parameter in names:
        parameter.requires_grad_(parameter in chosen)
    return [own[0] for parameter, own in names.items() if parameter in chosen]


def _named(
    names: dict[torch.nn.Parameter, list[str]], setting: str, patterns: str | Sequence[str]
) -> set[torch.nn.Parameter]:
    """The parameters in one of whose names one of the patterns is found."""
    found = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"`{setting}` holds {pattern!r}, which is no regular expression: {error}.") from None
        matches = {parameter for parameter, own in names.items() if any(map(expression.search, own))}
        if not matches:
            raise ValueError(
                f"`{setting}` holds {pattern!r}, which is found in no parameter that trains; there are {_some(names)}."
            )
        found |= matches
    return found


def _some(names: dict[torch.nn.Parameter, list[str]]) -> str:
    """The first, the last and those evenly between them, so that every kind of name has a chance."""
    every = [own[0] for own in names.values()]
    if len(every) <= _LISTED:
        return ", ".join(every) or "none"
    places = sorted({round(index * (len(every) - 1) / (_LISTED - 1)) for index in range(_LISTED)})
    return f"{len(every)}: {', '.join(every[place] for place in places)}, ..."
