"""Which calls an online contest looks at."""


class Pace:
    """Which calls are counted: where calls are short, looking after each would cost more than the budget allows."""

    def __init__(self) -> None:
        """Begin with a call that counts."""
        self.pause = 0
        self.passed = 0

    def passes(self) -> bool:
        """Return whether the call that begins now is computed by the incumbent and not counted."""
        if self.pause <= 0:
            return False
        self.pause -= 1
        self.passed += 1
        return True
