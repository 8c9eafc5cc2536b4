"""Libraries that only evaluation needs."""

from importlib import import_module
from types import ModuleType


def require(module: str, extra: str = "eval") -> ModuleType:
    """
    Imports a module of an extra.

    Args:
        module (`str`): Its name.
        extra (`str`, *optional*, defaults to `"eval"`): Which of `setup.cfg` installs it.

    Raises:
        ImportError: If it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"This needs {module.split('.')[0]}: pip install soul-trainer[{extra}]") from error
