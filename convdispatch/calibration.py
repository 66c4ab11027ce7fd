"""What corrects the backends' estimates on this machine: a few factors a backend, fitted to measurements.

A backend's estimate goes by rates that were written down on somebody else's machine. A calibration multiplies it by
``exp(constant + threads * log2(threads used) + short * ... + filters * ... + traffic * ... + config)``: how fast the
backend is here, how it scales with threads, and how it fares where a call is short, where the filters or the images
are larger than the second cache. Every term is a logarithm, 0 where nothing was wrong; ``short``, ``filters`` and
``traffic`` are 0 for problems that are neither. Where filters are packed in every call, the packing is added.

It stands in the profile under ``calibration MACHINE:`` and is made by ``tuning/calibrate.py``.
"""

import datetime as dt
import functools
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from convdispatch import machine, profile, safe_yaml
from convdispatch.backend import Backend, Candidate, Config, item_bytes
from convdispatch.errors import ProfileError, ProfileWarning, in_a_line, warn
from convdispatch.machine import Machine
from convdispatch.problem import Problem
from convdispatch.profile_file import Profile
from convdispatch.profile_text import flow, rounded

TERMS = ("constant", "threads", "short", "filters", "traffic")
SOURCES = ("calibrate", "tune")
#: Estimates below this many seconds are of short calls, whose launching counts.
_SHORT_SECONDS = 1e-4
#: No estimate is made more than so many times larger or smaller, whatever the terms say.
_MOST = math.log(10.0)


class Sizes(NamedTuple):
    """What the terms need to know of a problem: bytes of its filters, and of its input and output together."""

    filters: int
    images: int


@dataclass(frozen=True)
class Correction:
    """One backend's part.

    Attributes:
        version: of the backend that was measured; the correction of another is not used.
        terms: coefficients of ``TERMS``, on top of the common ones.
        configs: a further constant by config as text, without its threads.
        packing: seconds of packing filters, and seconds a byte of them, by config; ``""`` stands for any other.
        before, after: how many times the estimates were off, typically, without the correction and with it.
    """

    version: int
    terms: tuple[float, ...] = (0.0,) * len(TERMS)
    configs: Mapping[str, float] = field(default_factory=dict)
    packing: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    before: float = 1.0
    after: float = 1.0


@dataclass(frozen=True)
class Calibration:
    """The corrections for one machine.

    Attributes:
        machine: id of the machine's fingerprint.
        source: ``"calibrate"`` where problems were measured for it, ``"tune"`` where tuning's measurements served.
        measurements: how many candidates' times it was fitted to.
        common: coefficients of ``TERMS`` for every backend, measured or not.
        backends: by name.
        made: when, as ISO 8601 in UTC.
    """

    machine: str
    source: str
    measurements: int
    common: tuple[float, ...] = (0.0,) * len(TERMS)
    backends: Mapping[str, Correction] = field(default_factory=dict)
    made: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))


def sizes_of(problem: Problem) -> Sizes:
    """Return the sizes that the terms depend on."""
    size = item_bytes(problem.dtype)
    filters = problem.kh * problem.kw * problem.group_c * problem.k * size
    return Sizes(filters, problem.n * (problem.h * problem.w * problem.c + problem.oh * problem.ow * problem.k) * size)


def features(sizes: Sizes, threads: int, estimate: float, here: Machine) -> tuple[float, ...]:
    """Return what ``TERMS`` are multiplied by for a candidate estimated to take these seconds."""
    second_cache = here.caches[1]
    return (
        1.0,
        math.log2(threads),
        max(0.0, math.log(_SHORT_SECONDS / max(estimate, 1e-9))),
        max(0.0, math.log(sizes.filters / second_cache)) if sizes.filters else 0.0,
        max(0.0, math.log(sizes.images / second_cache)) if sizes.images else 0.0,
    )


@functools.lru_cache(maxsize=4096)
def config_text(config: Config) -> str:
    """Return a config without its threads, as text."""
    return ", ".join(f"{key}={value}" for key, value in config.items() if key != "threads")


Corrector = Callable[[str, int, str, int, float], float]


def _uncorrected(backend: str, version: int, config: str, threads: int, estimate: float) -> float:  # noqa: ARG001
    return estimate


def corrector(
    calibration: Calibration | None, sizes: Sizes, here: Machine, packing: Mapping[str, tuple[float, float]] | None
) -> Corrector:
    """Return a function from (backend, version, config without threads, threads, estimate) to corrected seconds.

    It is for one problem, whose part of the work is done once.

    Args:
        calibration: what corrects; None for the backends' own estimates.
        sizes: of the problem.
        here: this machine.
        packing: ``Backend.packing_cost`` by name where calls pack their filters, None where a plan has done so. What
            was measured on this machine goes before it.
    """
    if calibration is None and packing is None:
        return _uncorrected
    common, backends = (calibration.common, calibration.backends) if calibration else (Correction(0).terms, {})
    _, _, _, filters, images = features(sizes, 1, 1.0, here)
    by_backend: dict[tuple[str, int], tuple[Correction, float, float, float]] = {}

    def prepared(name: str, version: int) -> tuple[Correction, float, float, float]:
        own = backends.get(name)
        if own is None or own.version != version:
            own = Correction(version)
        terms = [a + b for a, b in zip(common, own.terms, strict=True)]
        found = own, terms[0] + terms[3] * filters + terms[4] * images, terms[1], terms[2]
        by_backend[name, version] = found
        return found

    def correct(name: str, version: int, config: str, threads: int, estimate: float) -> float:
        own, total, by_thread, by_shortness = by_backend.get((name, version)) or prepared(name, version)
        if threads > 1:
            total += by_thread * math.log2(threads)
        if estimate < _SHORT_SECONDS:
            total += by_shortness * math.log(_SHORT_SECONDS / max(estimate, 1e-9))
        seconds = estimate * math.exp(max(-_MOST, min(_MOST, total + own.configs.get(config, 0.0))))
        if packing is not None:
            launch, a_byte = own.packing.get(config) or own.packing.get("") or packing.get(name, (0.0, 0.0))
            seconds += launch + a_byte * sizes.filters
        return seconds

    return correct


def corrected(correct: Corrector, candidate: Candidate, estimate: float) -> float:
    """Return a candidate's estimate as a corrector of its problem has it."""
    backend: Backend = candidate.backend
    return correct(backend.name, backend.version, config_text(candidate.config), candidate.config.threads, estimate)


# Text -----------------------------------------------------------------------------------------------------------


def dump(calibration: Calibration) -> dict[str, str]:
    """Return the calibration as top-level text of a profile, by its key."""
    key = profile.CALIBRATION + calibration.machine
    lines = [f"{key}:", f"  made: {calibration.made}", f"  source: {calibration.source}"]
    lines += [f"  measurements: {calibration.measurements}", f"  common: {flow(_named(calibration.common))}"]
    lines.append("  backends:" if calibration.backends else "  backends: {}")
    for name, own in calibration.backends.items():
        row: dict[str, Any] = {"version": own.version, **_named(own.terms)}
        row |= {"configs": {config: rounded(value) for config, value in own.configs.items()}}
        row |= {"packing": {config: [rounded(x) for x in pair] for config, pair in own.packing.items()}}
        row |= {"before": rounded(own.before), "after": rounded(own.after)}
        lines.append(f"    {flow({name: row})[1:-1]}")
    return {key: "\n".join(lines) + "\n"}


def parse(machine_id: str, text: str) -> Calibration:
    """Read what ``dump`` wrote.

    Raises:
        ProfileError: if it cannot be understood.
    """
    try:
        data = safe_yaml.load(text)
        (content,) = data.values()
        made, source = content["made"], SOURCES[SOURCES.index(content["source"])]
        common, count = _coefficients(content["common"]), int(_finite(content["measurements"]))
        backends = {str(name): _correction(row) for name, row in content["backends"].items()}
        when = made.isoformat() if isinstance(made, dt.datetime | dt.date) else str(made)
        return Calibration(machine_id, source, count, common, backends, when)
    except Exception as error:  # a person may have written anything
        raise ProfileError(f"{type(error).__name__}: {error}") from error


def _correction(row: Any) -> Correction:
    packing = {str(name): (_finite(pair[0]), _finite(pair[1])) for name, pair in row["packing"].items()}
    configs = {str(name): _finite(value) for name, value in row["configs"].items()}
    before, after = _finite(row["before"]), _finite(row["after"])
    return Correction(int(_finite(row["version"])), _coefficients(row), configs, packing, before, after)


def _coefficients(row: Any) -> tuple[float, ...]:
    return tuple(_finite(row[name]) for name in TERMS)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ProfileError(f"{value!r:.60} is no number")
    return float(value)


def _named(terms: tuple[float, ...]) -> dict[str, float]:
    return {name: rounded(value) for name, value in zip(TERMS, terms, strict=True)}


def better_text(key: str, one: str, other: str) -> str:
    """Return whichever of two calibrations of a machine knows more: measured for the purpose, by more, later."""

    def worth(text: str) -> tuple[bool, int, str]:
        try:
            read = parse(key.removeprefix(profile.CALIBRATION), text)
        except ProfileError:
            return False, -1, ""
        return read.source == "calibrate", read.measurements, read.made

    return max(one, other, key=worth)


def broken(where: Profile) -> dict[str, str]:
    """Return the keys of a profile's calibrations that cannot be read, with why."""
    found = {}
    for key, text in where.notes(profile.CALIBRATION).items():
        try:
            parse(key.removeprefix(profile.CALIBRATION), text)
        except ProfileError as error:
            found[key] = in_a_line(error)
    return found


# The one in force -----------------------------------------------------------------------------------------------

#: What each profile that was read has for this machine.
_read: weakref.WeakKeyDictionary[Profile, Calibration | None] = weakref.WeakKeyDictionary()


def current(files: list[Profile] | None = None) -> Calibration | None:
    """Return this machine's calibration from the first profile that has one; None where nobody has calibrated.

    A broken one is warned of once, and is as if it were not there.

    Args:
        files: the profiles to look in; those of all layers where None.
    """
    for file in profile.files() if files is None else files:
        if file not in _read:
            _read[file] = _from(file)
        if (found := _read[file]) is not None:
            return found
    return None


def _from(file: Profile) -> Calibration | None:
    here = machine.current().id
    key = profile.CALIBRATION + here
    if key not in file.keys():  # noqa: SIM118  # a profile is no mapping
        return None
    try:
        return parse(here, file.text(key))
    except ProfileError as error:
        warn(f"{file.name}: calibration {here} is ignored: {error}", ProfileWarning)
        return None
