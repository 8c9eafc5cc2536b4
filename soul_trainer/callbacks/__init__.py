"""When things happen. What happens is elsewhere."""

from .hessian import HessianCallback
from .primal_dual import PrimalDualCallback
from .running import InterruptCallback, PairingCallback


__all__ = ["HessianCallback", "InterruptCallback", "PairingCallback", "PrimalDualCallback"]
