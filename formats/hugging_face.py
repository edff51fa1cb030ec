"""Hugging Face folders: `model-0000n-of-….safetensors` with their index, and `config.json`.

Meta's RoPE rotates elements 2i and 2i + 1 of a head together, Hugging Face's rotates i and
i + head_dim / 2. The rows of wq and wk are therefore permuted within each head when they are read
or written; no value changes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from formats.config_json import from_hugging_face, read_json
from formats.errors import FormatError
from formats.stored_tensor import (
    SAFETENSORS_DTYPES,
    StoredTensor,
    TensorSlice,
    bytes_of,
    n_bytes,
    unreadable,
)
from formats.weights import Weights, check_tensors, parameter_shapes

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
HUGGING_FACE_NAMES = {  # by Meta's name, without layer and `.weight`
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}
PERMUTED = ("attention.wq.weight", "attention.wk.weight")
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


def hugging_face_name(name: str) -> str:
    """Map `layers.3.attention.wq.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    stem, prefix = name.removesuffix(".weight"), ""
    if stem.startswith("layers."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{HUGGING_FACE_NAMES[stem]}.weight"


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Permute the rows of any number of heads, (heads · head_dim, dim), from Meta's order."""
    pairs = rows.unflatten(0, (-1, head_dim // 2, 2))  # (heads, pair, member, dim)
    return pairs.transpose(1, 2).reshape(rows.shape)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Permute the rows of any number of heads, (heads · head_dim, dim), to Meta's order."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))  # (heads, member, pair, dim)
    return halves.transpose(1, 2).reshape(rows.shape)


class HuggingFaceWeights(Weights):
    """A folder that `transformers` can load."""

    format = "hf"

    def _stored_name(self, name: str) -> str:
        return hugging_face_name(name)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Read a block as `Weights.read` does; wq and wk are read by whole heads and permuted."""
        if not name.endswith(PERMUTED):
            return super().read(name, offsets, sizes)
        head_dim = self.model.head_dim
        first = offsets[0] // head_dim * head_dim
        last = -(-(offsets[0] + sizes[0]) // head_dim) * head_dim
        heads = super().read(name, (first, offsets[1]), (last - first, sizes[1]))
        start = offsets[0] - first
        return to_pairs(heads, head_dim)[start : start + sizes[0]]


def open_hugging_face(folder: Path) -> HuggingFaceWeights:
    """Open a folder with a `config.json` and safetensors files.

    Raises:
        FormatError: A file is missing, damaged, or inconsistent with another one.
    """
    model = from_hugging_face(folder / CONFIG)
    stored: dict[str, StoredTensor] = {}
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError(f"{folder / INDEX} has no weight_map; download or copy it again")
        for file in sorted(set(weight_map.values())):
            stored |= _read_header(folder / file)
        absent = [f"{name} in {file}" for name, file in weight_map.items() if name not in stored]
        if absent:
            raise FormatError(
                f"{folder / INDEX} lists tensors that do not exist ({', '.join(absent[:8])}); "
                "download or copy the folder again"
            )
    elif (folder / SINGLE).exists():
        stored = _read_header(folder / SINGLE)
    else:
        raise FormatError(
            f"{folder} contains neither {SINGLE} nor {INDEX}; only Hugging Face folders with "
            "safetensors files can be read"
        )
    # Old releases also stored RoPE frequencies, which are computed, and a copy of a tied output.
    stored = {
        name: tensor
        for name, tensor in stored.items()
        if not name.endswith("rotary_emb.inv_freq")
        and not (model.tie_embeddings and name == "lm_head.weight")
    }
    expected = {hugging_face_name(name): shape for name, shape in parameter_shapes(model).items()}
    check_tensors(str(folder), stored, expected)
    return HuggingFaceWeights(folder, model, stored)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file without reading their values."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass  # validates the header and the file length
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except FileNotFoundError:
        raise FormatError(
            f"{path} does not exist but is listed in {INDEX}; download or copy it again"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{path} is damaged ({error}); download or copy it again") from None
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in TORCH_DTYPES:
            raise FormatError(
                f"{path}: {name} has dtype={entry['dtype']}; use weights in F32, BF16 or F16"
            )
        shape = tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]
        full = TensorSlice([0] * len(shape), shape, path, start)
        stored[name] = StoredTensor(TORCH_DTYPES[entry["dtype"]], shape, [full])
    return stored


def write_hugging_face(
    weights: Weights, folder: Path, dtype: torch.dtype | None, file_bytes: int
) -> None:
    """Write the tensors slab by slab, and their index.

    The safetensors library needs all tensors of a file in memory, so the file is written here: the
    length of the header in 8 bytes, the header as JSON, the values (safetensors' README, "Format").

    Args:
        dtype: Data type to write; None keeps the stored one.
        file_bytes: Maximum size of the values in a file, unless a single tensor is larger.
    """
    files: list[list[str]] = [[]]
    filled, total = 0, 0
    for name, shape in weights.shapes.items():
        size = n_bytes(shape, dtype or weights.dtype(name))
        if files[-1] and filled + size > file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled, total = filled + size, total + size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file_name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        weight_map |= {hugging_face_name(name): file_name for name in names}
        with (folder / file_name).open("xb") as file:
            _write_header(file, weights, names, dtype)
            for name in names:
                _write_values(file, weights, name, dtype)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_header(
    file: BinaryIO, weights: Weights, names: list[str], dtype: torch.dtype | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        shape = weights.shapes[name]
        written_dtype = dtype or weights.dtype(name)
        end = start + n_bytes(shape, written_dtype)
        header[hugging_face_name(name)] = {
            "dtype": SAFETENSORS_DTYPES[written_dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # aligns the values to 8 bytes
    file.write(len(content).to_bytes(8, "little") + content)


def _write_values(file: BinaryIO, weights: Weights, name: str, dtype: torch.dtype | None) -> None:
    permuted = name.endswith(PERMUTED)
    head_dim = weights.model.head_dim
    for slab in weights.slabs(name, row_multiple=head_dim if permuted else 1):
        values = to_halves(slab, head_dim) if permuted else slab
        if dtype is not None:
            values = values.to(dtype)
        file.write(bytes_of(values.contiguous()))


def config_dtype(weights: Weights, dtype: torch.dtype | None) -> str:
    """Return the `torch_dtype` of a `config.json`: the widest data type among the tensors."""
    dtypes = {dtype or weights.dtype(name) for name in weights.shapes}
    widest = max(dtypes, key=lambda each: (each.itemsize, str(each)))
    return str(widest).removeprefix("torch.")
