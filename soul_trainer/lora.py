"""LoRA adapters that are trained: how far a step of theirs goes, on which a default learning rate depends."""

import torch


# Of the adapters that the default learning rate is measured for: on queries and values, with a `lora_alpha` of 32.
USUAL_NUMBER, USUAL_ALPHA = 2, 32
NUMBER_POWER, ALPHA_POWER = 0.8, 0.5


def adapter_reach(model: torch.nn.Module) -> float | None:
    """
    How much further a step of one length in each weight goes than in adapters on queries and values with
    `lora_alpha=32`.

    An adapter adds `alpha / r * B A x`. In some tens of steps both matrices grow far beyond where they began, so that
    the sum over `r` rows is in proportion to `alpha` and to the square of the step, whatever the rank. The same change
    thus takes steps in proportion to `alpha**-0.5`. With the number of adapted matrices they were measured to fall as
    its power -0.8.

    Args:
        model (`torch.nn.Module`): The unwrapped model.

    Returns:
        `float`: `None` if no LoRA adapter trains.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_A." in name]
    num_layers = getattr(getattr(model, "config", None) and model.config.get_text_config(), "num_hidden_layers", None)
    if not names or not num_layers:
        return None
    alphas = []
    for name in names:
        module, _, adapter = name.removesuffix(".weight").partition(".lora_A.")
        layer = model.get_submodule(module)
        alphas.append(layer.scaling[adapter] * layer.r[adapter])
    alpha = abs(sum(alphas) / len(alphas))
    number = len(names) / num_layers
    return (number / USUAL_NUMBER) ** NUMBER_POWER * (alpha / USUAL_ALPHA) ** ALPHA_POWER
