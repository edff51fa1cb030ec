"""Published training runs of other trainers, with their sources: published_runs.csv and .yaml.

The CSV has one line per run; an empty cell is a setting that the source does not state. The YAML
has the reports and models that lines refer to. `usable` runs state all that the planner needs.
"""

import csv
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from model.config import ModelConfig

FOLDER = Path(__file__).parent
SETS = ("fit", "held_out")
STACKS = ("pytorch-eager", "pytorch-compile", "transformer-engine", "c++", "jax")
CHECKPOINTS = ("none", "full", "op", "every_2nd_layer")
"""Besides these, `layers:N` recomputes N layers, and `ops:a+b` the named parts of each layer."""


@dataclass(frozen=True)
class PublishedModel:
    """Shape of a dense decoder; `ffn_matrices` is 3 with a gate, otherwise 2."""

    name: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    ffn_matrices: int
    vocab_size: int
    tied: bool

    @property
    def config(self) -> ModelConfig:
        """The model with a gated FFN of as many parameters."""
        ffn_dim = self.ffn_dim * self.ffn_matrices // 3
        shape = (self.dim, self.n_layers, self.n_heads, self.n_kv_heads, ffn_dim, self.vocab_size)
        return ModelConfig(self.name, *shape, tie_embeddings=self.tied)


@dataclass(frozen=True)
class Report:
    """Where a table of runs was published, and by which kind of software they were run."""

    name: str
    document: str
    url: str
    published: str
    framework: str
    stack: str
    tokens_per_second: str
    notes: str = ""


@dataclass(frozen=True)
class PublishedRun:
    """One published run.

    Attributes:
        power_watts, peak_bandwidth_gb_s, network_gb_s, devices_per_node: Differences from the
            hardware file that the source states: power limit, peak bandwidth of the memory, peak
            of the network per device and direction.
        dp_shard: Devices that share what `sharding` shards: `fsdp` parameters, gradients and
            optimizer state, `zero2` all but the parameters, `zero1` optimizer state only. In
            Megatron `zero1` also shards over `cp`.
        micro_batch_size: Sequences per rank and micro-batch.
        micro_batches: Per step and data-parallel rank.
        fp8: `tensorwise` scales by the current maximum, `delayed` by those of former steps; both
            have one scale per tensor. `unstated` is fp8 of an unknown recipe.
        optimizer_state, reduce_dtype: Data types of the moments, and of the reduced gradients.
        chunked_loss: The logits of a micro-batch never exist all at once.
        offload: What is kept in host memory.
        tokens_per_second: Per device.
    """

    id: str
    report: str
    set: Literal["fit", "held_out"]
    hardware: str
    power_watts: float | None
    peak_bandwidth_gb_s: float | None
    network_gb_s: float | None
    devices_per_node: int | None
    devices: int
    dp_replicate: int
    dp_shard: int
    cp: int
    tp: int
    pp: int
    sharding: Literal["none", "ddp", "zero1", "zero2", "fsdp"]
    model: str
    seq_len: int
    micro_batch_size: int | None
    micro_batches: int | None
    activation_checkpoint: str | None
    compile: bool
    precision: Literal["bf16"]
    fp8: Literal["none", "tensorwise", "delayed", "rowwise", "blockwise", "mx", "unstated"]
    async_tp: bool | None
    attention: Literal["fa2", "fa3", "cudnn", "triton"] | None
    optimizer_state: Literal["fp32", "bf16"] | None
    reduce_dtype: Literal["fp32", "bf16"] | None
    chunked_loss: bool | None
    offload: str | None
    tokens_per_second: float
    memory_gib: float | None
    notes: str

    @property
    def usable(self) -> bool:
        """Whether the planner can plan the run: no pipeline, no offload, all settings stated."""
        stated = (self.micro_batch_size, self.micro_batches, self.activation_checkpoint)
        return self.pp == 1 and self.offload == "none" and None not in stated


def parse(value: str, expected: Any) -> Any:
    """Return a cell of the table as its field's type."""
    choices = get_args(expected)
    if type(None) in choices and not value:
        return None
    kinds = [kind for kind in choices or (expected,) if kind is not type(None)]
    literals = [each for kind in kinds for each in get_args(kind) or (kind,)]
    if get_origin(expected) is Literal or any(isinstance(each, str) for each in literals):
        if value not in literals:
            raise ValueError(f"{value!r} is not one of {literals}")
        return value
    (kind,) = kinds
    return {"true": True, "false": False}[value] if kind is bool else kind(value)


def load_runs() -> list[PublishedRun]:
    """Return all runs in the order of the table."""
    with (FOLDER / "published_runs.csv").open(encoding="utf-8", newline="") as file:
        return [
            PublishedRun(**{each.name: parse(row[each.name], each.type) for each in FIELDS})
            for row in csv.DictReader(file)
        ]


FIELDS = fields(PublishedRun)
_document = yaml.safe_load((FOLDER / "published_runs.yaml").read_text(encoding="utf-8"))
REPORTS = {
    name: Report(name, **{**values, "published": str(values["published"])})
    for name, values in _document["reports"].items()
}
MODELS = {name: PublishedModel(name, **values) for name, values in _document["models"].items()}
