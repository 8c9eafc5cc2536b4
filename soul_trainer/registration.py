"""
`optim="soul"` in transformers' own tables. With `engines/`, the only place that touches transformers' internals.

`import soul_trainer` adds two names to `OptimizerNames`, one handler to the table that `Trainer.create_optimizer`
reads, and one callback to those of every Trainer, which does nothing under other optimizers. So the string works
wherever transformers makes an optimizer: any Trainer, any engine.
"""

import copyreg

import torch
from accelerate.state import AcceleratorState
from aenum import extend_enum
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    trainer,
    trainer_optimizer,
)
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from .engines import check_engine, find_soul, prepare_deepspeed
from .optim import RULES, Sophia, Soul
from .soul_settings import SOUL_NAMES, SoulArguments, parse_optim_args


logger = logging.get_logger(__name__)

_SHORT_DTYPES = (torch.bfloat16, torch.float16)


def register() -> None:
    """Makes `TrainingArguments(optim="soul")` (alias `"sophia"`) valid. Calling it again changes nothing."""
    for name in SOUL_NAMES:
        if name not in OptimizerNames._value2member_map_:
            extend_enum(OptimizerNames, name.upper(), name)
        trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)] = _handler
    # A process that unpickles our names, as a spawned worker, may not have imported this package yet.
    copyreg.pickle(OptimizerNames, _reduce_name)
    if SophiaCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(SophiaCallback)


def optimizer_name(value: str) -> OptimizerNames:
    """The member of transformers' `OptimizerNames`; pickles of ours call it, and so import this package."""
    return OptimizerNames(value)


def _reduce_name(name: OptimizerNames) -> tuple:
    return (optimizer_name if name.value in SOUL_NAMES else OptimizerNames), (name.value,)


def _settings(args: TrainingArguments) -> SoulArguments:
    if isinstance(args, SoulArguments):
        return args
    settings = SoulArguments(**parse_optim_args(args.optim_args))
    settings.check()
    return settings


def _handler(context: trainer_optimizer.OptimizerContext) -> tuple[type[Soul], dict]:
    settings = _settings(context.args).optimizer_kwargs()
    return Soul if "rule" in settings else Sophia, {**context.optimizer_kwargs, **settings}


class SophiaCallback(TrainerCallback):
    """
    In every Trainer that asks for Sophia: refuses what cannot work before training, and says in the first step where
    the Hessian comes from if no [`HessianCallback`] does.
    """

    def __init__(self):
        self.has_told = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Checks the settings and the engine."""
        if args.optim in SOUL_NAMES:
            _settings(args)
            check_engine(AcceleratorState())
            prepare_deepspeed(args)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ) -> None:
        """Says what Sophia does by itself, once other callbacks had their chance to take that over."""
        sophia = find_soul(optimizer)
        if sophia is None or self.has_told or not state.is_world_process_zero:
            return
        self.has_told = True
        interval = sophia.param_groups[0]["hessian_interval"]
        if interval and sophia.defaults["rule"] == "kronecker":
            raise ValueError(
                "`rule=kronecker` needs HessianCallback, which measures the curvature of layers: add it, or set "
                "`rule=diagonal`."
            )
        if interval:
            logger.warning(
                f"Sophia's Hessian: the square of the training gradient, every {interval} step(s). HessianCallback "
                "would estimate it from labels that the model samples, as the paper does."
            )
        if any(param.dtype in _SHORT_DTYPES for group in sophia.param_groups for param in group["params"]):
            logger.warning(
                "The weights that Sophia steps are in 16 bits, and a step under half a unit in their last place is "
                "lost: of a weight of 0.02 in bfloat16, any under 6e-5. Load the model with dtype=torch.float32, and "
                "set bf16=True for the speed."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer=None, **kwargs
    ) -> None:
        """Refuses to take the first step by nothing but signs."""
        sophia = find_soul(optimizer)
        if sophia is None or state.global_step or sophia.param_groups[0]["hessian_interval"]:
            return
        has_hessian = RULES[sophia.param_groups[0]["rule"]].has_hessian
        if has_hessian and not any(float(held["hessian_weight"]) for held in sophia.state.values()):
            raise ValueError(
                "`hessian_interval=0` leaves the Hessian to HessianCallback, and there is none: Sophia would be sign "
                "descent. Add the callback, or set an interval >= 1."
            )
