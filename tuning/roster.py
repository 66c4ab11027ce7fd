"""Finds the workers of a Dask cluster that can tune, and asks each what machine it is on."""

import contextlib
import importlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convdispatch
from convdispatch import heuristic, machine, settings
from convdispatch.errors import ClusterError, in_a_line
from convdispatch.tuning.entrants import chosen_backends
from convdispatch.tuning.spread import Kind, Worker

#: Asks for the version in words that every worker understands, whatever is installed there.
_VERSION = "__import__('convdispatch').__version__"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class LeftOut:
    """A worker that does not take part.

    Attributes:
        address: where Dask finds it.
        reason: why.
    """

    address: str
    reason: str


def open_client(scheduler: str) -> Any:
    """Return a ``distributed.Client`` of a scheduler.

    Args:
        scheduler: its address or a scheduler file.

    Raises:
        ClusterError: if ``distributed`` is not installed, or there is no such scheduler.
    """
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise ClusterError(f"tuning on a Dask cluster needs pip install 'convdispatch[dask]': {error}") from error
    where = {"scheduler_file": scheduler} if Path(scheduler).is_file() else {"address": scheduler}
    try:
        return distributed.Client(**where, set_as_default=False, name="convdispatch")
    except Exception as error:
        raise ClusterError(
            f"no Dask scheduler can be reached at {scheduler!r}, which must be an address such as "
            f"tcp://10.0.0.1:8786 or a scheduler file: {said(error)}"
        ) from error


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Turn whatever Dask raises when the scheduler does not answer into a ``ClusterError``."""
    try:
        yield
    except Exception as error:
        raise ClusterError(f"the Dask scheduler does not answer; what was measured is kept: {said(error)}") from error


def said(error: BaseException) -> str:
    """Return an error's message in one line, its type where it has none."""
    return in_a_line(error) or type(error).__name__


def host() -> str:
    """Return what all workers on this machine have in common, and those on other machines have not."""
    try:  # containers of one machine have names of their own, but share its kernel
        return _BOOT_ID.read_text().strip()
    except OSError:
        return platform.node()


def introduce(threads: int | None, backends: Sequence[str] | None) -> tuple[str, str, Kind]:
    """Return this process's host, what people call it, and its kind of machine; runs on a worker.

    Raises:
        UnknownBackendError: if a backend is missing here.
    """
    chosen_backends(backends)
    budget = threads or heuristic.thread_budget(settings.current())
    return host(), platform.node(), Kind(machine.current(), budget)


class Roster:
    """Who is there.

    Attributes:
        workers: those that can tune, the lost ones too.
        left_out: those that cannot.
    """

    def __init__(self, client: Any, threads: int | None, backends: Sequence[str] | None) -> None:
        """Ask every worker of a client's cluster.

        Args:
            client: a ``distributed.Client``.
            threads: most threads that a candidate may use; each worker's own budget where None.
            backends: names of the backends that every worker must have, if any.

        Raises:
            ClusterError: if no worker can tune.
        """
        self._client = client
        self._question = threads, None if backends is None else list(backends)
        self._seen: set[str] = set()
        self.left_out: list[LeftOut] = []
        self.workers = self._meet(self.addresses())
        if not self.workers:
            reasons = "; ".join(f"{left.address}: {left.reason}" for left in self.left_out)
            raise ClusterError(f"no worker of the cluster can tune: {reasons or 'there are none'}")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The distinct kinds of machine."""
        return tuple(dict.fromkeys(worker.kind for worker in self.workers))

    def addresses(self) -> set[str]:
        """Return the addresses of all workers that are there now."""
        with connected():
            return set(self._client.nthreads())

    def newcomers(self, addresses: set[str]) -> list[Worker]:
        """Return workers not seen before, of kinds that were; those of other kinds are left out."""
        kinds = self.kinds
        fit = []
        for worker in self._meet(addresses):
            if worker.kind in kinds:
                fit.append(worker)
            else:
                reason = "it joined when tuning had begun, and is of another kind"
                self.left_out.append(LeftOut(worker.address, reason))
        self.workers += fit
        return fit

    def _meet(self, addresses: Iterable[str]) -> list[Worker]:
        """Ask workers that have not been asked yet; those that cannot take part are left out with the reason."""
        new = sorted(set(addresses) - self._seen)
        self._seen.update(new)
        here = convdispatch.__version__
        equal = []
        for address, version in self._ask(new, eval, _VERSION):
            if version == here:
                equal.append(address)
            else:
                found = said(version) if isinstance(version, Exception) else f"it has {version}"
                self.left_out.append(LeftOut(address, f"it needs convdispatch {here}: {found}"))
        met = []
        for address, answer in self._ask(equal, introduce, *self._question):
            if isinstance(answer, Exception):
                self.left_out.append(LeftOut(address, said(answer)))
            else:
                met.append(Worker(address, *answer))
        return met

    def _ask(self, addresses: list[str], question: Callable[..., Any], *words: Any) -> list[tuple[str, Any]]:
        """Return each worker's answer, or the exception that came instead."""
        if not addresses:
            return []
        with connected():
            answers = self._client.run(question, *words, workers=addresses, on_error="return")
        gone = ConnectionError("it was lost before it answered")
        return [(address, answers.get(address, gone)) for address in addresses]
