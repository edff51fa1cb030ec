"""File names by which formats are recognized. Imports nothing heavy."""

import re
from typing import Literal

Format = Literal["native", "hf", "meta"]
FORMATS: dict[Format, str] = {
    "native": "checkpoint",
    "hf": "Hugging Face folder",
    "meta": "Meta folder",
}
# Hugging Face
CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# In order of preference (_get_resolved_checkpoint_files in transformers' modeling_utils.py).
WEIGHT_FILES = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
# Meta
PARAMS = "params.json"
PART = re.compile(r"consolidated\.(\d+)\.pth")

TRAINING = "training.json"  # written by conversions to any format; other programs ignore it
