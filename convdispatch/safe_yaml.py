"""Reading YAML that anybody may have written: plain data only, nothing executed, nothing that can end the process.

And writing it, without lines that are broken for being long.
"""

from typing import Any

from convdispatch.errors import ConvDispatchError, in_a_line

#: Nothing that convdispatch writes or reads is nested deeper than this.
_DEPTH = 8
_TOO_DEEP = "nothing here is nested so deeply"


class YamlError(ConvDispatchError, ValueError):
    """A text is not YAML of the plain kind read here.

    Attributes:
        line: where, counted from 1; None if unknown.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        """Keep the message and the line."""
        super().__init__(message)
        self.line = line


def load(text: str | bytes) -> Any:
    """Return the text's data: mappings, lists and plain values.

    Raises:
        YamlError: if it is not YAML, uses aliases (a few lines of them can stand for gigabytes), nests deeply, or says
            something twice in one mapping, where the first would be lost in silence.
    """
    import yaml  # noqa: PLC0415  # needed only where there is a file to read

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_shape(text, loader)
        return yaml.load(text, Loader=loader)  # noqa: S506  # one of the two safe loaders
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        if "nesting" in str(error.problem):  # PyYAML from 6.0.4 on looks ahead, and finds it first
            raise YamlError(_TOO_DEEP, line) from None
        raise YamlError(f"this is not YAML: {error.problem or error.context}", line) from None
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # a date or number that is none gives a plain ValueError
        raise YamlError(f"this is not YAML: {in_a_line(error)}") from None


#: More than any line has, and the most that libyaml takes.
_WIDTH = 2**31 - 1


def dump(data: Any, *, flow: bool | None, unicode: bool = False) -> str:
    """Return data as YAML, the keys in their order.

    Args:
        data: mappings, lists and plain values.
        flow: whether all of it is in braces and brackets; None for collections without others in them.
        unicode: whether letters beyond ASCII are written as they are.
    """
    import yaml  # noqa: PLC0415  # needed only where there is a file to write

    style: dict[str, Any] = {"default_flow_style": flow, "sort_keys": False, "allow_unicode": unicode, "width": _WIDTH}
    try:
        return str(yaml.dump(data, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper), **style))
    except UnicodeError:  # half a letter, as in a file name of another encoding, is nothing for libyaml
        return str(yaml.dump(data, Dumper=yaml.SafeDumper, **style))


def _check_shape(text: str | bytes, loader: Any) -> None:
    # Before anything is built: deep nesting overflows the C stack in CSafeLoader, which ends the process.
    import yaml  # noqa: PLC0415

    within: list[_Collection] = []
    line = 0
    for event in yaml.parse(text, Loader=loader):
        line = event.start_mark.line + 1 if event.start_mark else line
        if isinstance(event, yaml.AliasEvent):
            raise YamlError("aliases are not read here; write the value out", line)
        if isinstance(event, yaml.CollectionEndEvent):
            within.pop()
        elif isinstance(event, yaml.NodeEvent):
            scalar = getattr(event, "value", None)
            if within and within[-1].is_doubled(scalar):
                raise YamlError(f"{scalar!r} stands twice in the same place; keep one of the two", line)
            if isinstance(event, yaml.CollectionStartEvent):
                within.append(_Collection(isinstance(event, yaml.MappingStartEvent)))
        if len(within) > _DEPTH:
            raise YamlError(_TOO_DEEP, line)


class _Collection:
    """A mapping or a list, as it is read."""

    def __init__(self, is_mapping: bool) -> None:
        self._is_mapping = is_mapping
        self._nodes = 0
        self._keys: set[str] = set()

    def is_doubled(self, text: str | None) -> bool:
        """Take the next node's text, None for what is no scalar; return whether it is a key for the second time."""
        is_key = self._is_mapping and self._nodes % 2 == 0
        self._nodes += 1
        if not is_key or text is None:
            return False
        was_there = text in self._keys
        self._keys.add(text)
        return was_there
