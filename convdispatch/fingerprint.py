"""How alike two machines are, field by field: what was measured on one may mean all, much or nothing on the other.

- **exact**: the same fingerprint.
- **soft**: the same processor and system, but other library versions, caches or core counts, or some of these unsaid.
  A time measured there is not the time here, but who won there most likely wins here.
- **hard**: another processor, other instruction sets or another system, or fewer cores than the entry's threads.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from convdispatch.machine import Machine

Grade = Literal["exact", "soft", "hard"]


@dataclass(frozen=True)
class Likeness:
    """What differs between a machine and this one, in words such as ``"numpy 2.3.1 instead of 2.4.6"``.

    Attributes:
        hard: differences that make measurements meaningless here.
        soft: differences that make them doubtful.
    """

    hard: tuple[str, ...] = ()
    soft: tuple[str, ...] = ()

    @property
    def grade(self) -> Grade:
        """The worst kind of difference there is."""
        return "hard" if self.hard else "soft" if self.soft else "exact"


def compare(there: Mapping[str, Any], here: Machine, threads: int = 1) -> Likeness:
    """Compare a machine, as a profile describes it, with this one.

    Args:
        there: the fields of ``Machine.describe``; a soft one that is missing or odd counts as unsaid.
        here: this machine.
        threads: the thread budget of the entry in question.
    """
    hard, soft = _processor(there, here)
    for name, mine in (("isa", here.isa), ("system", here.system)):
        theirs = there.get(name)
        same = set(map(str, theirs)) == set(mine) if isinstance(theirs, list) else theirs == mine
        if not same:
            hard.append(f"{name} {_words(theirs)} instead of {_words(mine)}")
    cores = there.get("cores")
    known = isinstance(cores, int)
    if cores != here.cores:
        fewest = min(cores, here.cores) if isinstance(cores, int) else here.cores
        said = f"{cores} cores instead of {here.cores}" if known else "number of cores unsaid"
        (hard if fewest < threads else soft).append(said)
    soft += _caches(there.get("caches"), here)
    soft += _libraries(there.get("libraries"), here)
    return Likeness(tuple(hard), tuple(soft))


def _processor(there: Mapping[str, Any], here: Machine) -> tuple[list[str], list[str]]:
    model, architecture = _cpu(there.get("cpu"))
    my_model, my_architecture = _cpu(here.cpu)
    if architecture != my_architecture:
        return [f"cpu {architecture or 'unsaid'} instead of {my_architecture}"], []
    if not model and my_model:
        return [], ["cpu model unsaid"]
    if model != my_model:
        return [f"cpu {model} instead of {my_model}"], []
    return [], []


def _cpu(text: Any) -> tuple[str, str]:
    """Return model and architecture of ``"MODEL (ARCHITECTURE)"``."""
    if not isinstance(text, str):
        return "", ""
    model, _, architecture = text.rpartition("(")
    return model.strip(), architecture.rstrip(") ").strip()


def _caches(theirs: Any, here: Machine) -> list[str]:
    if not isinstance(theirs, list) or len(theirs) != len(here.caches):
        return ["caches unsaid"]
    pairs = enumerate(zip(theirs, here.caches, strict=True), 1)
    return [f"L{level} cache of {_size(a)} instead of {_size(b)}" for level, (a, b) in pairs if a != b]


def _size(count: Any) -> str:
    return f"{count / 1024:.10g} KiB" if isinstance(count, int) else str(count)[:20]


def _libraries(theirs: Any, here: Machine) -> list[str]:
    if not isinstance(theirs, list):
        return ["library versions unsaid"]
    there, mine = _versions(theirs), _versions(here.libraries)
    return [
        f"{name} {there.get(name, 'unsaid')} instead of {mine.get(name, 'none')}"
        for name in dict.fromkeys((*mine, *there))
        if there.get(name) != mine.get(name)
    ]


def _versions(libraries: Any) -> dict[str, str]:
    pairs = (str(text).partition(" ") for text in libraries)
    return {name: version for name, _, version in pairs}


def _words(value: Any) -> str:
    return (", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "unsaid"))[:80] or "none"


def portable(there: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a machine's description others of its kind share: architecture, instruction sets, system.

    A machine that fits it is soft, never exact: model, cores, caches and library versions are left unsaid.
    """
    architecture = _cpu(there.get("cpu"))[1]
    return {"cpu": f"({architecture})"} | {name: there[name] for name in ("isa", "system") if name in there}
