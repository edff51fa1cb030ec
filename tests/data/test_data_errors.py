"""Errors of files from outside have messages of bounded length."""

import pytest

from data.errors import DataError
from formats.errors import FormatError
from resilience.run_folder import RunFolderError
from training.config_validation import ConfigError


@pytest.mark.parametrize("kind", [DataError, FormatError, RunFolderError])
def test_long_name_in_a_damaged_file_is_shortened(kind: type[Exception]) -> None:
    check(str(kind(f"a.safetensors has no tensor {'[' * 10**6}; download it again")))


def test_long_key_is_shortened() -> None:
    (error,) = ConfigError([f"a.safetensors has no {'x' * 10**6}; download it again"]).errors
    check(error)


def check(message: str) -> None:
    assert len(message) < 20_000
    assert message.startswith("a.safetensors has no") and message.endswith("download it again")
