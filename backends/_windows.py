"""Which outputs read inside the image, and what they read there: padding as slices, never as a copy."""


def overlap(first: int, count: int, offset: int, stride: int, length: int) -> tuple[slice, slice]:
    """Return which of ``count`` places from ``first`` on hold elements of ``0..length``, and which elements.

    Place ``i`` is element ``i * stride + offset``; the first slice is relative to ``first``.
    """
    low = max(first, -(offset // stride))
    high = min(first + count, -((offset - length) // stride))
    if low >= high:
        return slice(0, 0), slice(0, 0)
    return slice(low - first, high - first), slice(low * stride + offset, (high - 1) * stride + offset + 1, stride)
