"""Where the updates of a step go."""


def update_shares(squares: dict[str, float]) -> dict[str, float]:
    """
    Splits a sum of squares over the parts of a language model.

    Args:
        squares (`dict[str, float]`): The squared update of each parameter, by its name in the model.

    Returns:
        `dict[str, float]`: `embeddings`, `head`, `attention`, `mlp`, `other`, which sum to 1, and `largest_tensor`.
        A head that is tied to the embeddings counts as embeddings.
    """
    sums = dict.fromkeys(("embeddings", "head", "attention", "mlp", "other"), 0.0)
    for name, value in squares.items():
        sums[_part_of_model(name)] += value
    total = sum(sums.values()) or 1.0
    largest = max(squares.values(), default=0.0)
    return {**{part: value / total for part, value in sums.items()}, "largest_tensor": largest / total}


def _part_of_model(name: str) -> str:
    # The names that the decoder families of transformers use: Llama, Qwen, Gemma, GPT-2, GPT-NeoX, OPT, Falcon, Phi.
    parts = {
        "head": ("lm_head", "embed_out"),
        "embeddings": ("embed", "wte", "wpe"),
        "attention": ("attn", "attention"),
        "mlp": ("mlp", "feed_forward", "experts", "fc1", "fc2"),
    }
    is_norm = "norm" in name or ".ln_" in name
    return next((part for part, keys in parts.items() if not is_norm and any(key in name for key in keys)), "other")
