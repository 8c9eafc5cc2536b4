"""Task files for lm-eval; the folder is `TASKS_PATH`, for `lm_eval --include_path`."""

from pathlib import Path


TASKS_PATH = str(Path(__file__).parent)
