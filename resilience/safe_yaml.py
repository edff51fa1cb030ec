"""YAML files of unknown content: one kind of error, unique keys, bounded aliases and nesting."""

from typing import Any

import yaml

from data.files import TOO_DEEP, check_depth

MAX_VALUES = 100_000  # at one depth, the copies that aliases stand for included


class _UniqueKeyLoader(yaml.SafeLoader):
    """`yaml.SafeLoader`, which keeps the last value of a repeated key, with an error for it."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Not when it is constructed: then the keys that `<<` merges are among its own.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line, name = key.start_mark.line + 1, (key.tag, key.value)
                if name in lines:
                    where = f"(lines {lines[name]} and {line})"
                    raise yaml.YAMLError(f"{key.value} is given twice {where}; remove one of them")
                lines[name] = line
        return node


def parse_yaml(text: str) -> Any:
    """Return the value of YAML from a file: `yaml.safe_load` whose only error is `ValueError`.

    Raises:
        ValueError: It is not YAML, a mapping repeats a key, or its aliases expand to many or nested
            values.
    """
    try:
        value = _UniqueKeyLoader(text).get_single_data()
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    # The other errors are of scalars with an explicit tag, such as `!!int ""`.
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    check_depth(value, MAX_VALUES)
    return value
