"""YAML files of unknown content: one kind of error, and bounded aliases and nesting."""

from typing import Any

import yaml

from data.files import TOO_DEEP, check_depth

MAX_VALUES = 100_000  # at one depth, the copies that aliases stand for included


def parse_yaml(text: str) -> Any:
    """Return the value of YAML from a file: `yaml.safe_load` whose only error is `ValueError`.

    Raises:
        ValueError: It is not YAML, or its aliases expand to many or nested values.
    """
    try:
        value = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    # The other errors are of scalars with an explicit tag, such as `!!int ""`.
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    check_depth(value, MAX_VALUES)
    return value
