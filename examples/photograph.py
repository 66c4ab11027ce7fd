"""A photograph through banks of real filters, by every backend that can do them.

Prints how far each backend is from the exact picture and how long it takes beside the fastest, and saves a figure.
Needs scikit-image, which brings the photograph along, and matplotlib::

    python examples/photograph.py --output photograph.png
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import skimage.data
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from numpy.typing import NDArray

import convdispatch
from convdispatch import reference
from convdispatch.tuning.clock import system_clock
from convdispatch.tuning.race import RULES, race

Array = NDArray[Any]
PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket")  # files of the package: nothing is downloaded
DIRECTIONS = 8
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Standing:
    """One backend on one bank: largest deviation over the largest exact value, and time over the fastest's."""

    backend: str
    deviation: float
    ratio: float
    chosen: bool


def _grid(size: int) -> tuple[Array, Array]:
    rows, columns = np.mgrid[:size, :size] - size // 2
    return rows, columns


def gabor(size: int = 21, wavelength: float = 7.0, sigma: float = 4.0) -> Array:
    """Return Gabor filters ``[size, size, 2 * DIRECTIONS]``: the even ones, then the odd ones."""
    rows, columns = _grid(size)
    envelope = np.exp(-(rows**2 + columns**2) / (2 * sigma**2))
    envelope /= envelope.sum()
    across = [columns * np.cos(a) + rows * np.sin(a) for a in np.arange(DIRECTIONS) * np.pi / DIRECTIONS]
    waves = [wave(2 * np.pi * x / wavelength) for wave in (np.cos, np.sin) for x in across]
    return np.stack([envelope * (wave - np.sum(envelope * wave)) for wave in waves], axis=-1)  # blind to flat areas


def banks(photograph: Array) -> dict[str, tuple[Array, Array]]:
    """Return by name an image ``[1, H, W, C]`` and filters ``[KH, KW, 1, K]``: of grey, or of each colour apart."""
    colour = (photograph / 255)[None]
    grey = colour @ np.array([[0.299], [0.587], [0.114]])
    sobel = np.outer([1, 2, 1], [-1, 0, 1]) / 4
    rows, columns = _grid(15)
    gaussian = np.exp(-(rows**2 + columns**2) / (2 * 2.5**2))
    found = {
        "Sobel 3x3": (grey, np.stack([sobel, sobel.T], axis=-1)),
        "Gaussian 15x15": (colour, np.stack([gaussian / gaussian.sum()] * 3, axis=-1)),
        "motion 31x31": (colour, np.stack([np.eye(31)[::-1] / 31] * 3, axis=-1)),
        "Gabor 21x21": (grey, gabor()),
    }
    return {name: (_mirrored(x, len(w)), w[:, :, None].astype(np.float32)) for name, (x, w) in found.items()}


def _mirrored(image: Array, size: int) -> Array:
    """Return the image with a mirrored border, so that results have its size and no dark edges."""
    border = (size // 2, size // 2)
    return np.pad(image.astype(np.float32), ((0, 0), border, border, (0, 0)), mode="reflect")


def compare(image: Array, filters: Array) -> tuple[list[Standing], dict[str, str]]:
    """Run filters by every backend in turns; return how they stand, the fastest first, and why others cannot."""
    explanation = convdispatch.explain(image, filters, padding="VALID")
    rejected = {row.backend: row.reason for row in explanation.rows if row.candidate is None}
    plans = {
        row.backend: convdispatch.plan(image, filters, padding="VALID", backend=row.backend)
        for row in explanation.rows
        if row.candidate is not None
    }
    exact = reference.conv2d(explanation.problem.replace(dtype="float64"), image, filters)
    scale = np.abs(exact).max()
    runs = {name: functools.partial(plan, image) for name, plan in plans.items()}
    samples = race(runs, RULES["measure"], system_clock)
    fastest = min(sample.median for sample in samples.values())
    chosen = next((row.backend for row in explanation.rows if row.chosen), None)
    standings = [
        Standing(name, float(np.abs(plan(image) - exact).max() / scale), samples[name].median / fastest, name == chosen)
        for name, plan in plans.items()
    ]
    return sorted(standings, key=lambda standing: standing.ratio), rejected


def by_direction(responses: Array) -> Array:
    """Return a picture of a Gabor bank's responses: hue is the direction of the edges, light their strength."""
    even, odd = np.split(responses, 2, axis=-1)
    turns = np.exp(2j * np.pi * np.arange(DIRECTIONS) / DIRECTIONS)  # half a turn is the same direction again
    vector = ((even**2 + odd**2) * turns).sum(-1)
    strength = np.sqrt(np.abs(vector))
    light = np.clip(strength / np.percentile(strength, 99), 0, 1) ** 0.7
    hue = np.angle(vector) / (2 * np.pi) % 1
    return np.asarray(hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.7), light], axis=-1)))


def draw(photograph: Array, pictures: dict[str, Array], standings: dict[str, list[Standing]]) -> Figure:
    """Return the figure: the photograph, what the filters made of it, and how long each backend took."""
    across, down = np.moveaxis(pictures["Sobel 3x3"], -1, 0)
    strength = np.hypot(across, down)
    limit = float(np.percentile(strength, 99.5))
    slope = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    panels: list[tuple[str, Array, dict[str, Any]]] = [
        ("Photograph", photograph, {}),
        ("Gaussian, 15x15", pictures["Gaussian 15x15"].clip(0, 1), {}),
        ("Motion blur along a diagonal, 31x31", pictures["motion 31x31"].clip(0, 1), {}),
        ("16 Gabor filters, 21x21: hue is direction", by_direction(pictures["Gabor 21x21"]), {}),
        ("Sobel across, 3x3", across, slope),
        ("Sobel down, 3x3", down, slope),
        ("Both Sobels: strength of edges", strength, {"cmap": "magma", "vmin": 0, "vmax": limit}),
    ]
    figure = Figure(figsize=(16, 8 * photograph.shape[0] / photograph.shape[1] + 1.4), layout="constrained")
    axes = figure.subplots(2, 4).flat
    for axis, (title, picture, how) in zip(axes, panels, strict=False):
        axis.imshow(picture, **how)
        axis.set_title(title, fontsize=12)
        axis.set_axis_off()
    draw_times(axes[len(panels)], standings)
    worst = max(standing.deviation for table in standings.values() for standing in table)
    figure.suptitle(f"The same pictures from every backend, exact to {worst:.0e} of the largest value", fontsize=16)
    return figure


def draw_times(axis: Axes, standings: dict[str, list[Standing]]) -> None:
    """Draw a dot for each backend on each bank: its time over the fastest's."""
    names = sorted({standing.backend for table in standings.values() for standing in table})
    for lane, (name, colour) in enumerate(zip(names, mpl.color_sequences["Dark2"] * 4, strict=False)):
        height = 0.5 * (lane / max(1, len(names) - 1) - 0.5)
        dots = [(s.ratio, y + height) for y, table in enumerate(standings.values()) for s in table if s.backend == name]
        axis.hlines([y for _, y in dots], 0.9, [x for x, _ in dots], color=colour, alpha=0.35, linewidth=2)
        axis.plot(*np.transpose(dots), "o", color=colour, label=name)
    for y, name in enumerate(standings):
        axis.text(0.9, y - 0.36, name, fontsize=11, va="bottom")
    axis.set_xscale("log")
    axis.set_xlim(left=0.85)
    axis.set_ylim(len(standings) + 0.2, -0.75)  # downwards, with room for the names and the legend
    axis.set_yticks([])
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "left", "right"]].set_visible(False)
    axis.set_title("Time over the fastest backend's", fontsize=12)
    axis.legend(loc="lower center", ncols=3, frameon=False, columnspacing=1, handletextpad=0.2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Filter, compare, print and draw; return 0 if all backends agree."""
    parser = argparse.ArgumentParser(description="Filter a photograph by every backend and compare them.")
    parser.add_argument("--photograph", choices=PHOTOGRAPHS, default=PHOTOGRAPHS[0], help="one of scikit-image's")
    parser.add_argument("--size", type=int, help="cut out a square of this many pixels from the middle")
    parser.add_argument("--output", type=Path, default=Path("photograph.png"), help="where to save the figure")
    options = parser.parse_args(arguments)
    photograph: Array = getattr(skimage.data, options.photograph)()
    if options.size is not None:
        top, left = (max(0, (side - options.size) // 2) for side in photograph.shape[:2])
        photograph = photograph[top : top + options.size, left : left + options.size]
    pictures: dict[str, Array] = {}
    standings: dict[str, list[Standing]] = {}
    print(f"{'filters':16} {'backend':12} {'deviation':>10} {'time':>10}   (* is what conv2d picks by itself)")
    for name, (image, filters) in banks(photograph).items():
        pictures[name] = convdispatch.conv2d(image, filters, padding="VALID")[0]
        standings[name], rejected = compare(image, filters)
        for row in standings[name]:
            print(f"{name:16} {'* '[not row.chosen]}{row.backend:11} {row.deviation:10.1e} {row.ratio:9.2f}x")
        for backend, reason in rejected.items():
            print(f"{name:16}  {backend:12} cannot: {reason}")
    draw(photograph, pictures, standings).savefig(options.output, dpi=110)
    print(f"saved {options.output}")
    return int(any(row.deviation > TOLERANCE for table in standings.values() for row in table))


if __name__ == "__main__":
    sys.exit(main())
