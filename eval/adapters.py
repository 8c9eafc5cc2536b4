"""Adapters that are trained in the place of a whole model: flags that all recipes share."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass
class LoraArguments:
    """LoRA, where not all weights are trained."""

    lora_rank: int | None = field(default=None, metadata={"help": "Train LoRA adapters of this rank; SOUL has 8."})
    lora_alpha: float = field(default=32, metadata={"help": "Scale of the adapters (alpha), with lora_rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the adapters' input, with lora_rank."})
    lora_modules: str = field(
        default="q_proj,v_proj", metadata={"help": "Modules that get adapters, by commas, or all-linear."}
    )

    def __post_init__(self):
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"`lora_rank` must be at least 1, but it is {self.lora_rank}.")

    def peft_config(self) -> "LoraConfig | None":
        """The adapters to train; `None` trains the whole model."""
        if self.lora_rank is None:
            return None
        from peft import LoraConfig

        modules = self.lora_modules if self.lora_modules == "all-linear" else self.lora_modules.split(",")
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=modules,
        )

    def lora_settings(self) -> dict:
        """The settings of adapters, if there are any."""
        names = ("lora_rank", "lora_alpha", "lora_dropout", "lora_modules") if self.lora_rank else ()
        return {name: getattr(self, name) for name in names}
