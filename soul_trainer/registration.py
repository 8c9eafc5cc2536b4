"""
`optim="soul"` in transformers' own tables. With `engines.py`, the only place that touches transformers' internals.

`import soul_trainer` adds two names to `OptimizerNames` and one handler to the table that `Trainer.create_optimizer`
reads, so that the string works wherever transformers makes an optimizer: any Trainer, any engine.
"""

from aenum import extend_enum
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from .config import SOPHIA_NAMES, SophiaArguments, parse_optim_args
from .sophia import Sophia


def _sophia_handler(context: trainer_optimizer.OptimizerContext) -> tuple[type[Sophia], dict]:
    settings = context.args
    if not isinstance(settings, SophiaArguments):
        settings = SophiaArguments(**parse_optim_args(context.optim_args))
        settings.check()
    return Sophia, {**context.optimizer_kwargs, **settings.optimizer_kwargs()}


def register() -> None:
    """Makes `TrainingArguments(optim="soul")` (alias `"sophia"`) valid. Calling it again changes nothing."""
    for name in SOPHIA_NAMES:
        if name not in OptimizerNames._value2member_map_:
            extend_enum(OptimizerNames, name.upper(), name)
        trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)] = _sophia_handler
