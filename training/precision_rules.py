"""The rules that tie the number formats to machine, mesh, model and optimizer."""

import importlib.util

from model.config import ModelConfig
from parallel.config import FP8_MULTIPLE, PrecisionConfig
from parallel.mesh import MeshShape
from training.config import OptimConfig, TrainConfig

# A step keeps this share of the second moment; above it the change is below half a bf16 unit
# (2**-8), and a moment that should fade would stay for ever.
MAX_BETA2_BF16 = 1 - 2**-8


def fp8_errors(
    accelerator: str,
    mesh: MeshShape,
    precision: PrecisionConfig,
    model: ModelConfig,
    train: TrainConfig,
) -> list[str]:
    """What this machine, the mesh or the model lacks for fp8; counts GPUs only where it is on."""
    recipe = precision.fp8
    if recipe is None:
        return []
    if accelerator != "cuda":
        return [
            f"precision.fp8 ({recipe}) needs a GPU, and the run is on parallel.accelerator "
            f"{accelerator}, which has no fp8 products: use precision.fp8=null"
        ]
    import torch

    from parallel.float8 import CAPABILITY, lacking_capability

    found = []
    capability = lacking_capability(recipe) if torch.cuda.is_available() else None
    if capability is not None:
        least = CAPABILITY[recipe]
        remedy = "precision.fp8=null"
        if capability >= CAPABILITY["tensorwise"]:
            remedy = f"precision.fp8=tensorwise or {remedy}"
        found.append(
            f"precision.fp8 ({recipe}) needs GPUs of compute capability {least[0]}.{least[1]}, and "
            f"these have {capability[0]}.{capability[1]}: use {remedy}"
        )
    return found + fp8_size_errors(mesh, precision, model, train)


def fp8_size_errors(
    mesh: MeshShape, precision: PrecisionConfig, model: ModelConfig, train: TrainConfig
) -> list[str]:
    """The sizes that fp8 products cannot take, on whatever device."""
    recipe = precision.fp8
    if recipe is None:
        return []
    found = []
    widths = {
        "model.dim": model.dim,
        "model.n_kv_heads × head_dim": model.n_kv_heads * model.head_dim,
        "model.ffn_dim": model.ffn_dim,
    }
    for key, width in widths.items():
        if width % mesh.tp == 0 and width // mesh.tp % FP8_MULTIPLE:
            found.append(
                f"precision.fp8 ({recipe}) needs widths that are multiples of {FP8_MULTIPLE}, and "
                f"{key} ({width}) over parallel.tp ({mesh.tp}) is {width // mesh.tp}: use a "
                f"multiple of {FP8_MULTIPLE * mesh.tp}, or precision.fp8=null"
            )
    micro_batch_size = train.micro_batch_size or train.global_batch_size // mesh.dp
    if micro_batch_size * train.seq_len // mesh.cp % FP8_MULTIPLE:
        found.append(
            f"precision.fp8 ({recipe}) needs micro-batches of a multiple of {FP8_MULTIPLE} tokens, "
            f"and a rank's have {micro_batch_size} × train.seq_len ({train.seq_len}) / parallel.cp "
            f"({mesh.cp}): use a train.seq_len that is a multiple of {FP8_MULTIPLE * mesh.cp}, or "
            "precision.fp8=null"
        )
    return found


def moment_errors(precision: PrecisionConfig, optim: OptimConfig) -> list[str]:
    """Whether the second moment can follow the gradients in its format."""
    if precision.optimizer_state != "bf16" or optim.betas[1] <= MAX_BETA2_BF16:
        return []
    return [
        f"optim.betas ({optim.betas}) change the second moment by less than a bf16 number can tell "
        f"when the second is above {MAX_BETA2_BF16:.3f}: use precision.optimizer_state=fp32 or int8"
    ]


def torchao_errors(precision: PrecisionConfig) -> list[str]:
    """A number format that comes from torchao, which is an extra and not installed."""
    if importlib.util.find_spec("torchao") is not None:
        return []
    asked: list[tuple[str, str, str]] = []  # key, value, remedy
    if precision.fp8 is not None:
        asked.append(("fp8", precision.fp8, "null"))
    if precision.optimizer_state == "int8":
        asked.append(("optimizer_state", "int8", "bf16"))
    return [
        f"precision.{key} ({value}) needs the package torchao: install the extra `torchao` "
        f"(pip install '.[torchao]'), or use precision.{key}={remedy}"
        for key, value, remedy in asked
    ]


def evaluation_errors(precision: PrecisionConfig) -> list[str]:
    """What evaluation does not do."""
    if precision.fp8 is None:
        return []
    return [f"precision.fp8 ({precision.fp8}) is for training alone: use precision.fp8=null"]
