"""Programs that tests run in an interpreter of their own."""

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def run_well(program: str, seconds: float = 120) -> str:
    """Run a program from the checkout, hold that it ends well within these seconds, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program], timeout=seconds, capture_output=True, text=True, check=False, cwd=_ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
