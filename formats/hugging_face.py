"""Hugging Face folders: `model-0000n-of-….safetensors` with their index, and `config.json`.

Meta's RoPE rotates elements 2i and 2i + 1 of a head together, Hugging Face's rotates i and
i + head_dim / 2. The rows of wq and wk are therefore permuted within each head when they are read
or written; no value changes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.tokenizer import Tokenizer
from formats.config_json import from_hugging_face, to_hugging_face, write_json
from formats.file_names import CONFIG, INDEX
from formats.hugging_face_files import read_tensors
from formats.metadata import GENERATION, chat_template
from formats.stored_tensor import SAFETENSORS_DTYPES, Dims, StoredTensor, bytes_of
from formats.tokenizers import write_hugging_face as write_tokenizer
from formats.weights import Weights, check_tensors
from model.config import ModelConfig

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


@dataclass(frozen=True)
class PermutedTensor(StoredTensor):
    """A tensor whose rows are permuted within each head by `to_pairs` or `to_halves`."""

    source: StoredTensor
    head_dim: int
    permute: Callable[[Tensor, int], Tensor]

    def read(self, offsets: Dims = None, sizes: Dims = None) -> Tensor:
        """Read a block as `StoredTensor.read` does; the source is read by complete heads."""
        offsets, sizes = offsets or (0, 0), sizes or self.shape
        first = offsets[0] // self.head_dim * self.head_dim
        last = -(-(offsets[0] + sizes[0]) // self.head_dim) * self.head_dim
        heads = self.source.read((first, offsets[1]), (last - first, sizes[1]))
        start = offsets[0] - first
        return self.permute(heads, self.head_dim)[start : start + sizes[0]].to(self.dtype)


def permuted(
    tensors: Mapping[str, StoredTensor], head_dim: int, permute: Callable[[Tensor, int], Tensor]
) -> dict[str, StoredTensor]:
    """Return the tensors by Meta's name with the rows of wq and wk permuted."""
    return {
        name: PermutedTensor(tensor.dtype, tensor.shape, (), tensor, head_dim, permute)
        if name.endswith(PERMUTED)
        else tensor
        for name, tensor in tensors.items()
    }


def open_hugging_face(folder: Path) -> Weights:
    """Open a folder with a `config.json` and safetensors files or `pytorch_model.bin`.

    Raises:
        FormatError: A file is missing, damaged, or inconsistent with another one.
    """
    config = from_hugging_face(folder / CONFIG)
    stored, warnings = read_tensors(folder)
    # Old releases also stored RoPE frequencies, which are computed.
    stored = {name: t for name, t in stored.items() if not name.endswith("rotary_emb.inv_freq")}
    model, tensors = check_tensors(folder, config, stored, hugging_face_name)
    if model.tie_embeddings != config.tie_embeddings:
        warnings.append(
            f"{folder / CONFIG}: tie_word_embeddings=true, but lm_head.weight differs from "
            "model.embed_tokens.weight; the model is untied, as transformers loads it "
            "(model.tie_embeddings=false)"
        )
    tensors = permuted(tensors, model.head_dim, to_pairs)
    return Weights("hf", folder, model, tensors, warnings=warnings)


def write_hugging_face(
    model: ModelConfig,
    tensors: Mapping[str, StoredTensor],
    tokenizer: Tokenizer | None,
    folder: Path,
    file_bytes: int,
    ids: Mapping[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Write a folder that transformers loads: tensors, slab by slab, configuration and tokenizer.

    The safetensors library needs all tensors of a file in memory, so the file is written here: the
    length of the header in 8 bytes, the header as JSON, the values (safetensors' README, "Format").

    Args:
        file_bytes: Maximum size of the values in a file, unless a single tensor is larger.
        ids: `bos_token_id`, `eos_token_id` and, if known, `pad_token_id`.
        files: Written as they are, instead of those generated from the tokenizer.
    """
    tensors = {
        hugging_face_name(name): tensor
        for name, tensor in permuted(tensors, model.head_dim, to_halves).items()
    }
    headers: list[dict[str, Any]] = []  # of each file
    end = file_bytes
    for name, tensor in tensors.items():
        if end + tensor.n_bytes > file_bytes:
            headers.append({"__metadata__": {"format": "pt"}})
            end = 0
        start, end = end, end + tensor.n_bytes
        headers[-1][name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (start, end),
        }
    weight_map: dict[str, str] = {}
    for number, header in enumerate(headers, start=1):
        content = json.dumps(header, separators=(",", ":")).encode()
        content += b" " * (-len(content) % 8)  # aligns the values to 8 bytes
        names = [name for name in header if name in tensors]
        file_name = f"model-{number:05d}-of-{len(headers):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        with (folder / file_name).open("xb") as file:
            file.write(len(content).to_bytes(8, "little") + content)
            for slab in (slab for name in names for slab in tensors[name].slabs()):
                file.write(bytes_of(slab))
    size = sum(tensor.n_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)

    widest = max((each.dtype for each in tensors.values()), key=lambda d: (d.itemsize, str(d)))
    config = to_hugging_face(model, str(widest).removeprefix("torch."), ids)
    write_json(folder / CONFIG, config)
    write_json(folder / GENERATION, {**ids, "do_sample": False})
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, model.max_seq_len, chat_template(files))
    for name, content in files.items():
        if name != CONFIG:
            (folder / name).write_bytes(content)
