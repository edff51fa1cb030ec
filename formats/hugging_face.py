"""Hugging Face folders of weights: `model-0000n-of-….safetensors`, their index, `config.json`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from formats.configuration import from_hugging_face, read_json
from formats.errors import FormatError
from formats.pieces import DTYPES, Piece, StoredTensor, bytes_of, n_bytes, unreadable
from formats.rope_pairing import to_halves, to_pairs
from formats.weights import Weights, check_tensors, parameter_shapes

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
NAMES = {  # ours to theirs, within a layer and outside
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
TURNED = ("attention.wq.weight", "attention.wk.weight")  # whose rows RoPE pairs
FROM_FILE = {name: dtype for dtype, name in DTYPES.items()}


def hugging_face_name(name: str) -> str:
    """`layers.3.attention.wq.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    stem, prefix = name.removesuffix(".weight"), ""
    if stem.startswith("layers."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{NAMES[stem]}.weight"


class HuggingFaceWeights(Weights):
    """A folder that `transformers` loads."""

    format = "hf"

    def _stored_name(self, name: str) -> str:
        return hugging_face_name(name)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """As `Weights.read`, in Meta's pairing: of wq and wk the heads are read whole."""
        if not name.endswith(TURNED):
            return super().read(name, offsets, sizes)
        head_dim = self.model.head_dim
        first = offsets[0] // head_dim * head_dim
        last = -(-(offsets[0] + sizes[0]) // head_dim) * head_dim
        heads = super().read(name, (first, offsets[1]), (last - first, sizes[1]))
        begin = offsets[0] - first
        return to_pairs(heads, head_dim)[begin : begin + sizes[0]]


def open_hugging_face(folder: Path) -> HuggingFaceWeights:
    """A folder with a `config.json` and safetensors files.

    Raises:
        FormatError: a file is missing, damaged or at odds with another one.
    """
    model = from_hugging_face(folder / CONFIG)
    stored: dict[str, StoredTensor] = {}
    if (folder / INDEX).exists():
        named = read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict):
            raise FormatError(f"{folder / INDEX} has no weight_map: get it again")
        for file in sorted(set(named.values())):
            stored |= _tensors_of(folder / file)
        if absent := [f"{name} in {file}" for name, file in named.items() if name not in stored]:
            raise FormatError(
                f"{folder / INDEX} names tensors that are not there: {', '.join(absent[:8])}: "
                "get the folder again"
            )
    elif (folder / SINGLE).exists():
        stored = _tensors_of(folder / SINGLE)
    else:
        raise FormatError(
            f"{folder} holds neither {SINGLE} nor {INDEX}: of Hugging Face's folders those with "
            "safetensors are read"
        )
    # What old releases wrote too: frequencies, which are computed, and the tied head once more.
    stored = {
        name: tensor
        for name, tensor in stored.items()
        if not name.endswith("rotary_emb.inv_freq")
        and not (model.tie_embeddings and name == "lm_head.weight")
    }
    expected = {hugging_face_name(name): shape for name, shape in parameter_shapes(model).items()}
    check_tensors(str(folder), stored, expected)
    return HuggingFaceWeights(folder, model, stored)


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, not read; the library has looked at all of its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass  # the header is sound, and the file as long as it tells
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except FileNotFoundError:
        raise FormatError(
            f"{path} does not exist, and the folder's index names it: get it again"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (SafetensorError, ValueError) as error:
        raise FormatError(f"{path} is damaged ({error}): get it again") from None
    header.pop("__metadata__", None)
    stored = {}
    for name, entry in header.items():
        if entry["dtype"] not in FROM_FILE:
            raise FormatError(
                f"{path}: {name} has dtype {entry['dtype']}: use weights in F32, BF16 or F16"
            )
        shape = tuple(entry["shape"])
        start = 8 + length + entry["data_offsets"][0]
        piece = Piece([0] * len(shape), shape, path, start)
        stored[name] = StoredTensor(FROM_FILE[entry["dtype"]], shape, [piece])
    return stored


def write_hugging_face(
    weights: Weights, folder: Path, dtype: torch.dtype | None, file_bytes: int
) -> None:
    """Writes the tensors and their index, a slab at a time.

    The library writes a file from tensors that are all in memory, so the header is written here:
    its length in 8 bytes, JSON, then the values (safetensors' README, "Format").

    Args:
        dtype: Of the values; None keeps what they have.
        file_bytes: A file is closed when the next tensor would make it larger.
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
    named: dict[str, str] = {}
    for place, names in enumerate(files, start=1):
        file_name = f"model-{place:05d}-of-{len(files):05d}.safetensors"
        named |= {hugging_face_name(name): file_name for name in names}
        with (folder / file_name).open("xb") as file:
            _write_header(file, weights, names, dtype)
            for name in names:
                _write_values(file, weights, name, dtype)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(named.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_header(
    file: BinaryIO, weights: Weights, names: list[str], dtype: torch.dtype | None
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in names:
        shape = weights.shapes[name]
        kept = dtype or weights.dtype(name)
        end = place + n_bytes(shape, kept)
        header[hugging_face_name(name)] = {
            "dtype": DTYPES[kept],
            "shape": list(shape),
            "data_offsets": [place, end],
        }
        place = end
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # values begin at a multiple of 8
    file.write(len(content).to_bytes(8, "little") + content)


def _write_values(file: BinaryIO, weights: Weights, name: str, dtype: torch.dtype | None) -> None:
    turned = name.endswith(TURNED)
    head_dim = weights.model.head_dim
    for slab in weights.slabs(name, rows_at_a_time=head_dim if turned else 1):
        values = to_halves(slab, head_dim) if turned else slab
        if dtype is not None:
            values = values.to(dtype)
        file.write(bytes_of(values.contiguous()))


def config_dtype(weights: Weights, dtype: torch.dtype | None) -> str:
    """The dtype of all values as torch names it, for a configuration; of mixed ones the widest."""
    kinds = {dtype or weights.dtype(name) for name in weights.shapes}
    widest = max(kinds, key=lambda kind: (kind.itemsize, str(kind)))
    return str(widest).removeprefix("torch.")
