"""Ten lines of convdispatch: a call, a plan, a backend of one's own, and an explanation."""

import numpy as np
from numpy.typing import NDArray

import convdispatch

x = np.random.default_rng(0).standard_normal((1, 56, 56, 64), np.float32)  # N, H, W, C
w = np.random.default_rng(1).standard_normal((1, 1, 64, 128), np.float32)  # KH, KW, C, K

y = convdispatch.conv2d(x, w)  # picks a backend
layer = convdispatch.plan(x.shape, w, activation="relu")  # picks one, and packs the filters for many calls
print(layer(x).shape, layer)


@convdispatch.register("mine", rejects=lambda p: None if p.is_pointwise and p.groups == 1 else "only plain 1x1 filters")
def mine(x: NDArray[np.float32], w: NDArray[np.float32], problem: convdispatch.Problem) -> NDArray[np.float32]:
    """Return ``[N, OH, OW, K]``: every pixel that the strides do not skip, times a matrix."""
    down, right = problem.strides
    return np.asarray(x[:, ::down, ::right] @ w[0, 0])


print(np.abs(convdispatch.conv2d(x, w, backend="mine") - y).max())  # a backend asked for by name
print(convdispatch.explain(x, w))  # which would be chosen, why, and how the others stand
