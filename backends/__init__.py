"""The built-in algorithms, one a file. Files with an underscore are their helpers and are not backends.

``convdispatch.backends()`` lists every backend there is: this package is also a function, since its name and
the function's are the same word.
"""

import sys
from types import ModuleType


class _CallablePackage(ModuleType):
    def __call__(self) -> tuple[str, ...]:
        """Return the names of all backends: built in, installed and registered."""
        from convdispatch import registry  # noqa: PLC0415  # the registry is what imports this package

        return registry.names()


sys.modules[__name__].__class__ = _CallablePackage
