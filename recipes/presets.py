"""The settings that `tofu.py` starts from: what all optimizers share, and what is each one's own."""

# The best of the sweep in docs/benchmark.md on the small model, for each optimizer by the same rule.
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
    "adamw_torch": {"learning_rate": 8e-4, "retain_weight": 5.0},
    "soul": {"learning_rate": 1e-3, "retain_weight": 5.0, "rho": 1.0},
}

# SOUL's for gradient difference on TOFU with LLaMA-2-7B (OPTML-Group/SOUL, configs/), in bfloat16.
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
    "adamw_torch": {"retain_weight": 0.3},
    "soul": {"retain_weight": 2.0},
}
