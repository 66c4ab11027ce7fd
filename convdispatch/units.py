"""Seconds and bytes as people read them."""


def time_text(seconds: float | None) -> str:
    """Return a time for people, e.g. ``"612 us"``."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= 0.9995 * scale:  # three digits are shown
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def threads_text(threads: int, cores: int) -> str:
    """Return how many threads there are beside so many cores, for people."""
    return f"{threads} of {cores} cores' threads" if threads <= cores else f"{threads} threads on {cores} cores"


def bytes_text(count: int) -> str:
    """Return a size for people, e.g. ``"1.5 MiB"``."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 999.5:  # three digits are shown
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"
