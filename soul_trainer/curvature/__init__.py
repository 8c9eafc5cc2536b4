"""
How the loss bends: everything that is measured of its curvature. It knows nothing of when.

| file | what |
|---|---|
| `labels.py` | labels that are drawn, so that one squared gradient estimates curvature |
| `estimators.py` | the diagonal, by backwards that any engine can reduce: one table of estimators |
| `layers.py` | sums over the inputs and output gradients of linear layers, by hooks |
| `positions.py` | what one backward says of a layer, for these sums, and how it is kept for a second pass |
| `kronecker.py` | eigenbases of these sums, second moments in them, and their inverse |
| `measure.py` | the two passes over rows that give them |
| `resumable.py` | the passes and the diagonal, written down on the way |
| `file.py` | all of it on disk |
| `command.py` | `python -m soul_trainer.curvature`, which makes such a file |
| `products.py` | the Gauss-Newton matrix itself, as products with vectors |
| `report.py` | what a step did |
"""

from .estimators import ESTIMATORS, estimate_hessian
from .file import Curvature, check_model, load_curvature, save_curvature
from .kronecker import KroneckerCurvature
from .layers import linear_layers, num_kronecker_numbers
from .measure import measure_matrices
from .report import update_shares


__all__ = [
    "ESTIMATORS",
    "Curvature",
    "KroneckerCurvature",
    "check_model",
    "estimate_hessian",
    "linear_layers",
    "load_curvature",
    "measure_matrices",
    "num_kronecker_numbers",
    "save_curvature",
    "update_shares",
]
