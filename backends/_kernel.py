"""The kernel that a plan keeps of what ``_arguments`` compiles: packed filters, and all but a call's arrays."""

from collections.abc import Callable, Mapping
from typing import Any

from convdispatch.arguments import Array
from convdispatch.backends._arguments import CompiledKernel
from convdispatch.backends._entry import ArrayKind, Entry, entry
from convdispatch.backends._team import run_jobs
from convdispatch.memory import address
from convdispatch.problem import Problem


def run(kernel: CompiledKernel, block: Array, count: int, threads: int) -> None:
    """Run the jobs of a kernel's work on up to this many threads.

    Args:
        kernel: what to run.
        block: its packed arguments; the arrays they mean must be alive.
        count: how many jobs there are.
        threads: most threads to use.

    Raises:
        MemoryError: if a job did not come to its end.
    """
    if (done := run_jobs(kernel.address, address(block), count, threads)) != count:
        raise MemoryError(f"{count - done} of {count} jobs of a convolution failed")


class PackedKernel:
    """A compiled kernel with its arguments; see ``convdispatch.backend.Kernel``.

    The kernel's arguments must have the arrays ``input``, ``out`` and ``residual``. If they have a number ``spoiled``,
    the kernel sets it where a sum is not finite, and calls return whether it did.

    Attributes:
        kernel: the compiled kernel.
        block: its packed arguments, but for the addresses of a call's arrays.
        places: where in the block the addresses of input, out and residual go.
        spoiled_at: where in the block it reports sums that are not finite, None if it does not.
        count: jobs of its work.
    """

    def __init__(
        self,
        compiled: Callable[[], CompiledKernel],
        problem: Problem,
        values: Mapping[str, Any],
        count: int,
        threads: int,
    ) -> None:
        """Fill in what is the same in every call.

        Args:
            compiled: returns the compiled kernel; a pickle has this in place of machine code.
            problem: what is computed, as the backend sees it.
            values: the kernel's arguments by name, except for the arrays of a call.
            count: jobs of the work.
            threads: most threads to use.
        """
        self._recipe = compiled, problem, values, count, threads
        self.count, self._threads = count, threads
        self.kernel, p = compiled(), problem
        arguments = self.kernel.arguments
        self.block = arguments.pack(**values, **self.kernel.calls)
        self.places = tuple(arguments.at[name] for name in ("input", "out", "residual"))
        for at, shape in zip(self.places, ((p.n, p.h, p.w, p.c), *2 * ((p.n, p.oh, p.ow, p.k),)), strict=True):
            self.block[at + 1 : at + 5] = shape
        self._adds = p.epilogue.residual
        if not self._adds:
            self.block[self.places[2] + 1 : self.places[2] + 5] = 0
        self.spoiled_at = arguments.at.get("spoiled")

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedKernel, self._recipe

    def __call__(self, input: Array, out: Array, residual: Array | None) -> bool | None:
        """Convolve ``input`` into ``out``."""
        block = self.filled(input, out, residual)
        run(self.kernel, block, self.count, self._threads)
        return self.told(block)

    def filled(self, input: Array, out: Array, residual: Array | None) -> Array:
        """Return the kernel's arguments for a call."""
        block = self.block.copy()
        at = self.places
        block[at[0]], block[at[1]] = address(input), address(out)
        if residual is not None:
            block[at[2]] = address(residual)
        return block

    def told(self, block: Array) -> bool | None:
        """Return what a call returns whose arguments these were."""
        return None if self.spoiled_at is None else bool(block[self.spoiled_at])

    def entry(self, input_like: ArrayKind, out_like: ArrayKind) -> Entry | None:
        """Return the short way into this kernel for arrays of such shapes and dtypes, or None where there is none."""
        source, target, added = self.places
        return entry(
            self.kernel, self.block, (source, target), added if self._adds else None, self.spoiled_at, self.count,
            self._threads, input_like, out_like,
        )  # fmt: skip


class WrappedKernel:
    """A kernel that is run, job by job, from within another that is compiled for that."""

    def __init__(self, around: PackedKernel, recipe: tuple[Any, ...], *, reports: bool) -> None:
        """Take the kernel around.

        Args:
            around: what is called.
            recipe: what a pickle makes it of again: the arguments of the subclass.
            reports: whether the kernel inside tells of sums that are not finite; the one around then does, too.
        """
        self._around, self._recipe, self._reports = around, recipe, reports

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._recipe

    def __call__(self, input: Array, out: Array, residual: Array | None) -> bool | None:
        """Convolve ``input`` into ``out``; see ``convdispatch.backend.Kernel``."""
        told = self._around(input, out, residual)
        return told if self._reports else None

    def entry(self, input_like: ArrayKind, out_like: ArrayKind) -> Entry | None:
        """Return the short way into this kernel; see ``PackedKernel.entry``."""
        return self._around.entry(input_like, out_like)
