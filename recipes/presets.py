"""
The settings that `tofu.py` starts from: what all optimizers share, and what is each one's own for a forget loss, or by
`default` for those that nobody tuned.
"""

# Each optimizer's best on the small model by the rule of docs/benchmark.md.
SMALL_MODEL = {
    "common": {
        "output_dir": "outputs/tofu",
        "forget_loss": "npo",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 6,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    },
    "adamw_torch": {
        "npo": {"learning_rate": 8e-4, "retain_weight": 10.0},
        "ga": {"learning_rate": 1.6e-3, "retain_weight": 10.0},
        "default": {"learning_rate": 8e-4, "retain_weight": 5.0},
    },
    "soul": {
        "npo": {"learning_rate": 1e-3, "rho": 3.0, "retain_weight": 2.0},
        "ga": {"learning_rate": 1e-3, "rho": 3.0, "retain_weight": 5.0},
        "default": {"learning_rate": 1e-3, "rho": 3.0, "retain_weight": 5.0},
    },
}

# SOUL's on TOFU with LLaMA-2-7B (OPTML-Group/SOUL, configs/): gradient difference, and preference optimization.
PUBLISHED = {
    "common": {
        "output_dir": "outputs/tofu",
        "forget_loss": "ga",
        "learning_rate": 5e-6,
        "weight_decay": 0.1,
        "warmup_steps": 0.1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 5,
        "bf16": True,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    },
    "adamw_torch": {
        "ga": {"retain_weight": 0.3},
        "refusal": {"learning_rate": 2e-5, "retain_weight": 1.0},
        "default": {},
    },
    "soul": {
        "ga": {"retain_weight": 2.0},
        "refusal": {"learning_rate": 1e-5, "retain_weight": 5.0},
        "default": {},
    },
}
