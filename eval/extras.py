"""Libraries that only evaluation needs."""

from importlib import import_module
from types import ModuleType


def require(module: str) -> ModuleType:
    """
    Imports a module of the `eval` extra.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"This needs {module.split('.')[0]}: pip install soul-trainer[eval]") from error
