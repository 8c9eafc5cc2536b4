"""A whole unlearning run in small, for the tests of the trainer: rows, tokenizer, model, settings."""

import torch
from toys import tiny_llama, toy_tokenizer

from soul_trainer import UnlearnConfig, UnlearnTrainer


NAMES = ["Mara", "Bo", "Ines", "Otto", "Yuki", "Omar", "Lena", "Raj", "Sol", "Tom", "Uma", "Vic"]
PLACES = ["Rome", "Oslo", "Lima", "Cairo", "Quito"]


def question_rows(names: list[str]) -> list[dict]:
    """Two questions a name, whose answers have different lengths."""
    rows = []
    for place, name in enumerate(names):
        city = PLACES[place % len(PLACES)]
        rows.append({"question": f"where was {name} born ?", "answer": f"{name} was born in {city} ."})
        rows.append({"question": f"who is {name} ?", "answer": f"the writer {name} from {city} wrote books ."})
    return rows


FORGET, RETAIN = question_rows(NAMES[:4]), question_rows(NAMES[4:])
TOKENIZER_TEXTS = [f"Question : {row['question']} Answer : {row['answer']}" for row in FORGET + RETAIN]


def scene_tokenizer():
    """A tokenizer of the scene's words; its pad is its end of sequence."""
    return toy_tokenizer([*TOKENIZER_TEXTS, "I do not know that ."])


def scene_model(seed: int = 0, **settings):
    """A Llama of a few thousand parameters for the scene's words."""
    size = {"hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64, "initializer_range": 0.1}
    return tiny_llama(seed, **{"vocab_size": len(scene_tokenizer()), **size, **settings})


def scene_config(output_dir, **settings) -> UnlearnConfig:
    """Two epochs of two steps of the published rule, with a Hessian that is neither all clipped nor idle."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "rule": "sophia",
        "rho": 1.0,
        "hessian_interval": 2,
        "hessian_batch_size": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    if settings.get("rule", "sophia") != "sophia" or settings.get("optim", "soul") not in ("soul", "sophia"):
        del defaults["rule"], defaults["rho"]
    return UnlearnConfig(**{**defaults, **settings})


def scene_trainer(output_dir, model=None, trainer_arguments: dict | None = None, **settings) -> UnlearnTrainer:
    """A trainer of the scene."""
    return UnlearnTrainer(
        model or scene_model(),
        scene_config(output_dir, **settings),
        FORGET,
        RETAIN,
        scene_tokenizer(),
        **(trainer_arguments or {}),
    )


def spoil(model, word: str):
    """Has the model give no number wherever a word is, while its weights stay finite; `.remove()` heals it."""
    place = scene_tokenizer().convert_tokens_to_ids(word)

    def put_nan(module, arguments, output):
        return output.masked_fill((arguments[0] == place).unsqueeze(-1), float("nan"))

    return model.get_input_embeddings().register_forward_hook(put_nan)


def weights(model) -> dict[str, torch.Tensor]:
    """A copy of a model's weights."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference between two sets of weights."""
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def logged(trainer: UnlearnTrainer, key: str) -> list[float]:
    """The logged values of a key, in order."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
