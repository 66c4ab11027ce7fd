"""The command ``convdispatch``; also ``python -m convdispatch``."""

import errno
import os
import sys

from convdispatch import exit_codes

#: What writing to a full device, or a broken one, fails with.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main() -> None:
    """Run the command; an interrupt ends it quietly also while what it needs is being imported, for a second or so."""
    try:
        from convdispatch.cli import main as run  # noqa: PLC0415
    except KeyboardInterrupt:
        sys.stderr.write("convdispatch: interrupted\n")
        sys.exit(exit_codes.INTERRUPTED)
    try:
        try:
            run()
        finally:
            sys.stdout.flush()  # or the interpreter would fail at it, when nobody can explain that
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        sys.stderr.write(f"convdispatch: the output cannot be written: {error.strerror}\n")
        _give_up_output()
        sys.exit(exit_codes.ERROR)


def _give_up_output() -> None:
    """Have what is left in the output's buffer go nowhere: the interpreter's end would fail at it again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


if __name__ == "__main__":
    main()
