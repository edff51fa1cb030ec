"""Configuration of `evaluate.py` and `generate.py`. Imports nothing heavy."""

import math
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Interval, Lt, MinLen

from model.config_base import ConfigSection, PositiveInt
from parallel.config import ParallelConfig, PrecisionConfig


@dataclass(frozen=True)
class EvaluationConfig(ConfigSection):
    """Held-out text to evaluate, and how.

    Attributes:
        data: A prepared folder; None for the data of the checkpoint's run.
        seq_len: Tokens per window; None for the data of the checkpoint's run.
        samples: Number of windows; None for all.
        micro_batch_size: Windows per data rank and forward.
        output: The file to write.
    """

    data: str | None = None
    seq_len: PositiveInt | None = None
    samples: PositiveInt | None = None
    micro_batch_size: PositiveInt = 8
    output: str | None = None


@dataclass(frozen=True)
class EvaluateJobConfig(ConfigSection):
    """Root configuration of `evaluate.py`; everything else comes from the checkpoint."""

    checkpoint: Annotated[str, MinLen(1)]
    evaluation: EvaluationConfig
    tasks: list[str]
    task_folder: str | None
    num_fewshot: Annotated[int, Ge(0)] | None
    limit: PositiveInt | None
    apply_chat_template: bool
    log_samples: bool
    tokenizer_path: str | None
    parallel: ParallelConfig
    precision: PrecisionConfig


@dataclass(frozen=True)
class GenerateJobConfig(ConfigSection):
    """Root configuration of `generate.py`; conf/generate.yaml documents its keys."""

    checkpoint: Annotated[str, MinLen(1)]
    prompt: str | None
    prompts: Annotated[str, MinLen(1)] | None
    chat: bool
    system: str | None
    max_new_tokens: PositiveInt
    temperature: Annotated[float, Ge(0), Lt(math.inf)]
    top_p: Annotated[float, Interval(gt=0, le=1)] | None
    top_k: PositiveInt | None
    repetition_penalty: Annotated[float, Interval(ge=0.01, le=100)] | None
    stop: list[Annotated[str, MinLen(1)]]
    seed: int
    batch_size: PositiveInt
    tokenizer_path: str | None
    parallel: ParallelConfig
    precision: PrecisionConfig
