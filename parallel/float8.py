"""fp8: the matrix products of the blocks in 8-bit floating point, by torchao.

Forward and both products of the backward cast their factors with scales found on the fly, one a
tensor or one a row, and give back what a Linear layer gives. Weights, their names and their
gradients stay as they are; embedding, output head, norms and attention compute as without fp8.
"""

from dataclasses import replace
from typing import Literal

import torch

from model.llama import Llama

Recipe = Literal["tensorwise", "rowwise"]

# The least compute capability of an NVIDIA GPU whose tensor cores have the scaled product.
CAPABILITY = {"tensorwise": (8, 9), "rowwise": (9, 0)}


def apply_float8(model: Llama, recipe: Recipe, emulate: bool = False) -> None:
    """Replaces the Linear layers of the blocks, in place and before any axis cuts them.

    Args:
        model: On the meta device or with its weights.
        recipe: One scale a tensor (the fastest), or one a row, rounded to a power of two (closer).
        emulate: Round the factors to fp8 and multiply them in float32, which any device can.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    convert_to_float8_training(model.layers, config=config)


def lacking_capability(recipe: Recipe) -> tuple[int, int] | None:
    """The compute capability of this machine's GPUs where it is too low for a recipe, else None."""
    capability = torch.cuda.get_device_capability()
    return capability if capability < CAPABILITY[recipe] else None
