"""Frozen dataclasses that are looked up by often, and so hashed once."""

import functools
from typing import Any, ClassVar


class HashedOnce:
    """A frozen dataclass that keeps its hash.

    Python would write a dataclass another ``__hash__``, so its body says ``__hash__ = HashedOnce.__hash__``.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, name) for name in self.__dataclass_fields__))

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # Hashes of strings differ between processes: what was worked out stays behind.
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
