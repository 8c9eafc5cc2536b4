"""
Measures the curvature of a model's loss once, for every later request to remove something from it.

    python -m soul_trainer.curvature --model DIR --dataset retain.jsonl --output curvature.safetensors
    torchrun --nproc_per_node 8 -m soul_trainer.curvature ...
"""

import sys

from .command import main


if __name__ == "__main__":
    sys.exit(main())
