"""Has Ctrl-C end the command ``convdispatch`` without a traceback while its package is being imported.

That takes a third of a second, before ``__main__`` can see to it. A program that imports convdispatch is left alone.
"""

import sys
from pathlib import PurePath
from types import TracebackType


def is_the_command(argv: list[str], original: list[str]) -> bool:
    """Return whether the process is ``convdispatch`` or ``python -m convdispatch``.

    Args:
        argv: ``sys.argv``, which begins with ``-m`` while the package of such a module is being imported.
        original: ``sys.orig_argv``.
    """
    if argv[:1] == ["-m"]:
        return "-m" in original[:-1] and original[original.index("-m") + 1] == "convdispatch"
    return bool(argv) and PurePath(argv[0]).stem == "convdispatch"


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("convdispatch: interrupted\n")
    else:
        sys.__excepthook__(kind, error, trace)


if is_the_command(getattr(sys, "argv", []), sys.orig_argv) and sys.excepthook is sys.__excepthook__:
    sys.excepthook = _tell
