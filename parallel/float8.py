"""fp8 matrix products of the blocks, by torchao.

The products of forward and backward cast their operands to fp8 with dynamic scales, one per tensor
or one per row, and return the dtype of a Linear layer. Weights, their names and gradients do not
change. Embedding, output head, norms and attention are not affected.
"""

from dataclasses import replace
from typing import Literal

from model.llama import Llama

Recipe = Literal["tensorwise", "rowwise"]

# Minimum compute capability of NVIDIA GPUs whose tensor cores support the scaled product.
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}


def apply_float8(model: Llama, recipe: Recipe, emulate: bool = False) -> None:
    """Replace the Linear layers of the blocks in place. Call it before sharding them.

    Args:
        model: On the meta device or with weights.
        recipe: `tensorwise`, one scale per tensor (fastest), or `rowwise`, one per row, rounded to
            a power of two (more accurate).
        emulate: Round the operands to fp8 and multiply them in float32, on any device.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model.layers, config=config)
