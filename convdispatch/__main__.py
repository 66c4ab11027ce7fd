"""The command ``convdispatch``; also ``python -m convdispatch``."""

import sys

from convdispatch import exit_codes


def main() -> None:
    """Run the command; an interrupt ends it quietly also while what it needs is being imported, for a second or so."""
    try:
        from convdispatch.cli import main as run  # noqa: PLC0415
    except KeyboardInterrupt:
        sys.stderr.write("convdispatch: interrupted\n")
        sys.exit(exit_codes.INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
