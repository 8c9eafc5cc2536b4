"""
Runs a script that never heard of this package as `python SCRIPT` would, but with `--optim soul` made valid.

    python -m soul_trainer SCRIPT [ARGUMENT ...]
    accelerate launch [OPTION ...] -m soul_trainer SCRIPT [ARGUMENT ...]
    torchrun [OPTION ...] -m soul_trainer SCRIPT [ARGUMENT ...]

What a script can still notice: our frames below its own if it looks at the stack, and that transformers and what it
imports are there before it begins. Variables that they read once, as HF_HOME, must be set outside the script.
"""

import os
import sys
from importlib.machinery import SourceFileLoader
from types import TracebackType


def main(arguments: list[str]) -> None:
    """Runs the script that comes first in `arguments`; whatever it raises, its `SystemExit` too, goes through."""
    if not arguments or arguments[0].startswith("-"):
        is_help = arguments[:1] in (["-h"], ["--help"])
        print(__doc__.strip(), file=sys.stdout if is_help else sys.stderr)
        sys.exit(0 if is_help else 2)
    path = os.path.join(os.getcwd(), arguments[0])  # Python does not normalize it either
    folder = path if os.path.isdir(path) else os.path.dirname(os.path.realpath(path))
    if folder == path:
        path = os.path.join(path, "__main__.py")
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.orig_argv[0]}: can't open file {path!r}: {reason}", file=sys.stderr)
        sys.exit(2)
    sys.argv[:] = arguments
    # With `-P` Python puts no folder in front: there is none to replace.
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = folder
    namespace = _vacated_main(path)
    try:
        exec(compile(source, path, "exec", dont_inherit=True), namespace)
    except BaseException as error:
        _show_only(error.__traceback__.tb_next)
        raise


def _vacated_main(path: str) -> dict:
    """
    The globals of `__main__` as Python makes them for a script. The module stays the same object, because libraries
    that are imported by now hold it: dill, and with it `datasets.map`, pickles what it finds in that one by name.
    """
    namespace = vars(sys.modules["__main__"])
    for name in [name for name in namespace if not (name.startswith("__") and name.endswith("__"))]:
        del namespace[name]
    namespace.update(
        {name: None for name in ("__doc__", "__package__", "__spec__", "__cached__") if name in namespace}
    )
    namespace.update(__file__=path, __loader__=SourceFileLoader("__main__", path))
    return namespace


def _show_only(traceback: TracebackType | None) -> None:
    """Makes Python report the error that is now being raised with this traceback, without the frames around it."""
    hook = sys.excepthook

    def shown(kind: type[BaseException], error: BaseException, _: TracebackType | None) -> None:
        sys.excepthook, sys.last_traceback = hook, traceback
        hook(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = shown


if __name__ == "__main__":
    # From a second copy of this file, because the first one's globals become the script's.
    from soul_trainer.__main__ import main

    main(sys.argv[1:])
