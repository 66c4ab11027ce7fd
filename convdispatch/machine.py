"""The machine's fingerprint: what must be the same for an old measurement to mean anything here."""

import functools
import hashlib
import json
import os
import platform
import re
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

from convdispatch.hashed import HashedOnce

#: Instruction sets that decide which kernels run well; the rest of a CPU's features do not matter here.
_DECIDING_FEATURES = ("avx512f", "avx512_vnni", "avx512_bf16", "avx2", "fma", "asimd", "sve", "asimddp", "i8mm")
_LIBRARIES = ("numpy", "scipy", "numba")
_DEFAULT_CACHES = (32 << 10, 1 << 20, 16 << 20)


@dataclass(frozen=True)
class Machine(HashedOnce):
    """What a measurement depends on besides the problem.

    Attributes:
        cpu: brand and microarchitecture, e.g. ``"AMD EPYC (zen4)"``, or the model where that is not known.
        isa: the deciding instruction sets that compiled code may use, strongest first.
        cores: cores this process may use (affinity and container quota respected).
        caches: bytes of L1 data, L2 and L3 cache; per core for the first two.
        system: operating system and architecture, e.g. ``"Linux x86_64"``.
        libraries: name and version of every library that kernels come from.
    """

    cpu: str
    isa: tuple[str, ...]
    cores: int
    caches: tuple[int, int, int]
    system: str
    libraries: tuple[str, ...]

    __hash__ = HashedOnce.__hash__

    @functools.cached_property
    def id(self) -> str:
        """Short stable name of this fingerprint, e.g. ``"zen4-2c-1f3a99c0"``."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        architecture = self.cpu.rpartition("(")[2].rstrip(")").strip() or "cpu"
        return f"{architecture}-{self.cores}c-{digest}"

    @property
    def vector_bytes(self) -> int:
        """Width of the widest usable vector register in bytes."""
        if "avx512f" in self.isa:
            return 64
        return 32 if "avx2" in self.isa else 16

    def describe(self) -> dict[str, object]:
        """Return the fingerprint as plain data for a profile or a report."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@functools.cache
def current() -> Machine:
    """Return the fingerprint of the machine this process runs on (measured once)."""
    import archspec.cpu  # noqa: PLC0415  # the lookup is needed only where a profile or an estimate is
    from archspec.cpu.detect import detected_info  # noqa: PLC0415

    host = archspec.cpu.host()
    brand = archspec.cpu.brand_string() or host.vendor
    # Where a hypervisor hides a feature, archspec knows a common level only, and of its features no more than that.
    name = host.name if host.vendor != "generic" else _model() or host.name
    features = _allowed({*host.features, *detected_info().features})
    if host.name in {"aarch64", "arm64"} or "asimd" in features or platform.machine() in {"arm64", "aarch64"}:
        features.add("asimd")
    return Machine(
        cpu=f"{brand} ({name})",
        isa=tuple(name for name in _DECIDING_FEATURES if name in features),
        cores=usable_cores(),
        caches=_cache_sizes(),
        system=f"{platform.system()} {platform.machine()}",
        libraries=tuple(f"{name} {_version(name)}" for name in _LIBRARIES),
    )


def _model() -> str:
    """Return a processor's family and model as Linux tells them on x86, empty elsewhere."""
    try:
        told = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return ""
    found = [re.search(rf"^{name}\s*: (\d+)$", told, re.MULTILINE) for name in ("cpu family", "model")]
    return "-".join(f"{word}{match[1]}" for word, match in zip(("family", "model"), found, strict=True) if match)


def _allowed(features: set[str]) -> set[str]:
    """Return those of a processor's features that Numba was told to compile for; all if it was told nothing.

    LLVM spells them without underscores.
    """
    told = os.environ.get("NUMBA_CPU_FEATURES", "")
    if not (told or os.environ.get("NUMBA_CPU_NAME")):
        return features
    return {feature for feature in features if f"+{feature.replace('_', '')}" in told.split(",")}


@functools.cache
def usable_cores() -> int:
    """Return how many cores this process may use: affinity, container quota and the hardware, the least."""
    try:
        import loky  # noqa: PLC0415  # 30 ms to import, needed once
    except RuntimeError:  # the program is about to end, and loky's pools want to be told when
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(loky.cpu_count()))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"


def _cache_sizes() -> tuple[int, int, int]:
    """Read L1d, L2 and L3 sizes from Linux's sysfs; common sizes where there is none."""
    found: dict[int, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = int((index / "level").read_text())
            size = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind != "Instruction" and size.endswith("K") and size[:-1].isdigit():
            found[level] = int(size[:-1]) << 10
    l1, l2, l3 = (found.get(level, default) for level, default in enumerate(_DEFAULT_CACHES, 1))
    return l1, l2, l3
