"""Configuration of `convert.py`. Imports nothing heavy."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, MinLen

from model.config_base import ConfigSection, PositiveInt


@dataclass(frozen=True)
class ConvertJobConfig(ConfigSection):
    """Root configuration of `convert.py`; conf/convert.yaml documents its keys."""

    checkpoint: Annotated[str, MinLen(1)]
    target: str
    format: Literal["native", "hf", "meta"] | None
    dtype: Literal["fp32", "bf16", "fp16"] | None
    parts: PositiveInt
    file_gb: Annotated[float, Gt(0)]
    tokenizer_path: str | None
    overwrite: bool
