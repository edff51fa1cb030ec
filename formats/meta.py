"""Meta's folders of weights: `consolidated.NN.pth`, one a tensor-parallel part, and `params.json`.

Parts are read with `weights_only=True` alone, so that a file which carries code is refused, and as
fake tensors, which know where their values lie in the file; the values are read when asked for.
"""

import errno
import json
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from formats.configuration import from_meta, to_meta
from formats.errors import FormatError
from formats.pieces import Piece, StoredTensor, bytes_of, unreadable
from formats.weights import Weights, check_tensors, parameter_shapes

PARAMS = "params.json"
PART = re.compile(r"consolidated\.(\d+)\.pth")
# The dim that tensor parallelism cuts (model.py in Meta's llama-models); norms are whole in each.
CUT = {
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output", "tok_embeddings"), 0),
    **dict.fromkeys(("wo", "w2"), 1),
}


def cut_dim(name: str) -> int | None:
    """The dim of a parameter that is cut into parts; None where each part has the whole."""
    return CUT.get(name.removesuffix(".weight").rpartition(".")[2])


class MetaWeights(Weights):
    """A folder that Meta's own programs load."""

    format = "meta"

    def _stored_name(self, name: str) -> str:
        return name


def open_meta(folder: Path) -> MetaWeights:
    """A folder with a `params.json` and any number of parts.

    Raises:
        FormatError: a part is missing, damaged, carries code, or is at odds with the others.
    """
    paths = sorted(path for path in folder.iterdir() if PART.fullmatch(path.name))
    numbers = [int(PART.fullmatch(path.name)[1]) for path in paths]  # type: ignore[index]
    if numbers != list(range(len(numbers))):
        raise FormatError(
            f"{folder} holds the parts {', '.join(path.name for path in paths)}: they must count "
            "from consolidated.00.pth on; get the others"
        )
    stored = _put_together(folder, [_tensors_of(path) for path in paths])
    ends = ("tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight")
    if absent := [name for name in ends if name not in stored]:
        raise FormatError(f"{folder} does not hold {', '.join(absent)}: get the folder again")
    embedding, output, w1 = (stored[name] for name in ends)
    tied = embedding.shape == output.shape and _equal(embedding, output)
    model = from_meta(folder / PARAMS, embedding.shape[0], w1.shape[0], tied)
    if tied:
        del stored["output.weight"]
    check_tensors(str(folder), stored, parameter_shapes(model))
    return MetaWeights(folder, model, stored)


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a part, of which only names, shapes and places are read."""
    with FakeTensorMode():
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except OSError as error:
            raise unreadable(path, error) from None
        except pickle.UnpicklingError:
            raise FormatError(
                f"{path} holds more than tensors, and might run code: it is not read. Get the "
                "weights from where they were published, or save them again as a plain dictionary "
                "of tensors"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError) as error:
            told = str(error).splitlines()[0]
            raise FormatError(f"{path} is damaged ({told}): get it again") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(tensor, torch.Tensor) for tensor in tensors.values()
    ):
        raise FormatError(f"{path} is no dictionary of tensors: use Meta's consolidated.NN.pth")
    stored = {}
    for name, tensor in tensors.items():
        if name == "rope.freqs":  # of old releases; frequencies are computed
            continue
        if not tensor.is_contiguous():
            raise FormatError(f"{path}: {name} is not contiguous: save it again with contiguous()")
        begin: Any = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if begin is None:
            raise FormatError(f"{path} is of PyTorch's format before 1.6: save it again")
        start = begin + tensor.storage_offset() * tensor.element_size()
        shape = tuple(tensor.shape)
        stored[name] = StoredTensor(
            tensor.dtype, shape, [Piece([0] * len(shape), shape, path, start)]
        )
    return stored


def _put_together(folder: Path, parts: list[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """The tensors of the whole model, with a piece in each part that is needed."""
    for place, part in enumerate(parts):
        if other := sorted(set(part) ^ set(parts[0])):
            raise FormatError(
                f"{folder}: consolidated.{place:02d}.pth and consolidated.00.pth do not hold the "
                f"same tensors ({', '.join(other[:8])}): get the folder again"
            )
    # Parts may outnumber the heads of keys and values; each is then in several of them.
    n_kv_heads = _n_kv_heads(folder)
    stored = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        if any((tensor.shape, tensor.dtype) != (first.shape, first.dtype) for tensor in tensors):
            raise FormatError(f"{folder}: parts disagree about {name}: get the folder again")
        dim = cut_dim(name)
        if dim is None or len(first.shape) <= dim:
            stored[name] = first
            continue
        if name.endswith(("attention.wk.weight", "attention.wv.weight")):
            tensors = tensors[:: max(1, len(parts) // n_kv_heads)]
        length = first.shape[dim]
        pieces = []
        for place, tensor in enumerate(tensors):
            offsets = [0] * len(first.shape)
            offsets[dim] = place * length
            pieces += [
                Piece(offsets, piece.shape, piece.path, piece.start()) for piece in tensor.pieces
            ]
        shape = list(first.shape)
        shape[dim] = length * len(tensors)
        stored[name] = StoredTensor(first.dtype, tuple(shape), pieces)
    return stored


def _n_kv_heads(folder: Path) -> int:
    """What `params.json` tells of it."""
    from formats.configuration import read_json

    values = read_json(folder / PARAMS)
    number = values.get("n_kv_heads") or values.get("n_heads")
    if not isinstance(number, int) or number < 1:
        raise FormatError(f"{folder / PARAMS}: n_kv_heads ({number}) is no number of heads")
    return number


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two matrices hold the same bits; stops at the first that differ."""
    rows = max(1, 2**24 // one.shape[1])
    for first in range(0, one.shape[0], rows):
        sizes = (min(rows, one.shape[0] - first), one.shape[1])
        a, b = one.read((first, 0), sizes), other.read((first, 0), sizes)
        if a.dtype != b.dtype or not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True


def parts_problem(parts: int, weights: Weights) -> str | None:
    """Why a model cannot be cut into so many parts; None where it can."""
    model = weights.model
    sizes = {key: getattr(model, key) for key in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size")}
    odd = [f"model.{key} ({size})" for key, size in sizes.items() if size % parts]
    if not odd:
        return None
    fitting = [
        str(n) for n in range(1, model.n_kv_heads + 1) if not any(s % n for s in sizes.values())
    ]
    return f"parts ({parts}) does not divide {', '.join(odd)}: use {' or '.join(fitting)}"


def write_meta(weights: Weights, folder: Path, dtype: torch.dtype | None, parts: int) -> None:
    """Writes the parts, a slab at a time, and `params.json`.

    PyTorch writes a file with room for its values, which are filled in afterwards; so the checksums
    in its zip are those of zeros, which no `torch.load` looks at.
    """
    names = list(weights.shapes)
    if weights.model.tie_embeddings:
        names.append("output.weight")  # Meta's model has both
    for part in range(parts):
        path = folder / f"consolidated.{part:02d}.pth"
        starts = _write_empty(weights, path, names, dtype, parts)
        with path.open("r+b") as file:
            for name in names:
                source = name if name in weights.shapes else "tok_embeddings.weight"
                _write_part(weights, source, file.fileno(), starts[name], dtype, part, parts)
    values = json.dumps(to_meta(weights.model), indent=2)
    (folder / PARAMS).write_text(values + "\n", encoding="utf-8")


def _local_shape(shape: Sequence[int], dim: int | None, parts: int) -> tuple[int, ...]:
    """The shape of one of so many parts."""
    return tuple(size // parts if place == dim else size for place, size in enumerate(shape))


def _write_empty(
    weights: Weights, path: Path, names: list[str], dtype: torch.dtype | None, parts: int
) -> dict[str, int]:
    """Writes a part without its values; returns where they belong."""
    with FakeTensorMode():
        tensors = {}
        for name in names:
            source = name if name in weights.shapes else "tok_embeddings.weight"
            shape = _local_shape(weights.shapes[source], cut_dim(name), parts)
            tensors[name] = torch.empty(shape, dtype=dtype or weights.dtype(source))
        try:
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(tensors, path)
        except RuntimeError as error:  # what PyTorch makes of a full disk
            raise OSError(errno.EIO, str(error).splitlines()[0]) from None
    return {name: stored.pieces[0].start() for name, stored in _tensors_of(path).items()}


def _write_part(
    weights: Weights,
    name: str,
    file: int,
    start: int,
    dtype: torch.dtype | None,
    part: int,
    parts: int,
) -> None:
    """Writes the values of one parameter into the room that is left for them."""
    dim = cut_dim(name)
    local = _local_shape(weights.shapes[name], dim, parts)
    offsets = [size * part if place == dim else 0 for place, size in enumerate(local)]
    for values in weights.slabs(name, offsets=offsets, sizes=local):
        if dtype is not None:
            values = values.to(dtype)
        buffer = bytes_of(values.contiguous())
        while buffer:
            written = os.pwrite(file, buffer, start)
            buffer, start = buffer[written:], start + written
