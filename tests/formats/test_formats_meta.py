"""Meta folders: reading and writing any number of parts, params.json, rejected input."""

import ast
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import llama_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llama_models.sku_list import resolve_model
from random_weights import (
    KINDS,
    SMALL,
    RandomWeights,
    assert_same_weights,
    filled,
    meta_parts,
    plain_llama,
    same_bits,
    tokens_of,
    write_meta_by_hand,
)

from formats.config_json import (
    _meta_ffn_factors,
    from_meta,
    meta_ffn_dim,
    meta_rope_warning,
    to_meta,
)
from formats.conversion import convert
from formats.detection import open_weights
from formats.errors import FormatError
from model.config import ModelConfig, RopeScaling
from model.rope import rope_frequencies

CONF = Path(__file__).parent.parent.parent / "conf" / "model"
# Omitted in published files, and different for the small model.
EXTRA_PARAMS: dict[str, object] = {"context_length": SMALL.max_seq_len}


def params_of(model: ModelConfig) -> dict[str, object]:
    scaling = model.rope_scaling
    if scaling is None:
        return EXTRA_PARAMS
    return EXTRA_PARAMS | {
        f"rope_{key}": value for key, value in dataclasses.asdict(scaling).items()
    }


@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_meta_weights_give_reference_logits_and_round_trip_bit_exactly(
    kind: str, parts: int, tmp_path: Path
) -> None:
    made = RandomWeights(KINDS[kind], torch.bfloat16)
    write_meta_by_hand(made, tmp_path / "meta", parts, **params_of(made.model))
    weights = open_weights(tmp_path / "meta")
    assert weights.format == "meta"
    assert_same_weights(weights, made)
    tokens = tokens_of(made.model)
    with torch.no_grad():
        logits = filled(weights)(tokens)
    expected = plain_llama(made.values, made.model, tokens)
    scale = expected.abs().max().item()
    # float32 vs. float64: measured 2e-6 of the largest logit; a wrong RoPE pairing changes a third.
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5 * scale)

    convert(weights, None, tmp_path / "native", "native")
    convert(open_weights(tmp_path / "native"), None, tmp_path / "again", "meta", parts=parts)
    for part, before in enumerate(meta_parts(made, parts)):
        path = tmp_path / "again" / f"consolidated.{part:02d}.pth"
        after = torch.load(path, weights_only=True)
        assert set(after) == set(before)
        assert all(same_bits(after[name], before[name]) for name in before)


def test_parts_are_merged_and_split(tmp_path: Path) -> None:
    made = RandomWeights(SMALL)
    write_meta_by_hand(made, tmp_path / "8", 8, **EXTRA_PARAMS)
    for before, after in ((8, 2), (2, 1), (1, 4)):
        source = open_weights(tmp_path / str(before))
        convert(source, None, tmp_path / str(after), "meta", parts=after)
        found = open_weights(tmp_path / str(after))
        assert len(list((tmp_path / str(after)).glob("*.pth"))) == after
        assert_same_weights(found, made)


def test_more_parts_than_kv_heads_replicate_heads(tmp_path: Path) -> None:
    made = RandomWeights(SMALL)
    write_meta_by_hand(made, tmp_path / "16", 16, **EXTRA_PARAMS)
    assert_same_weights(open_weights(tmp_path / "16"), made)
    with pytest.raises(FormatError, match=r"parts=16 does not divide model\.n_kv_heads=8"):
        convert(open_weights(tmp_path / "16"), None, tmp_path / "out", "meta", parts=16)
    assert not (tmp_path / "out").exists()


def test_reading_a_block_reads_only_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RandomWeights(SMALL)
    write_meta_by_hand(made, tmp_path / "meta", 2, **EXTRA_PARAMS)
    weights = open_weights(tmp_path / "meta")
    read, real = [0], os.preadv

    def counted(file: int, buffers: Any, offset: int) -> int:
        read[0] += sum(len(buffer) for buffer in buffers)
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    for name, offsets, sizes in (
        ("layers.1.attention.wo.weight", (0, 24), (64, 16)),  # columns of both parts
        ("layers.0.feed_forward.w1.weight", (40, 0), (20, 64)),  # rows of both parts
        ("norm.weight", (16,), (8,)),
    ):
        read[0] = 0
        block = weights.tensors[name].read(offsets, sizes)
        assert same_bits(block, made.tensors[name].read(offsets, sizes))
        assert read[0] == block.numel() * 4


PUBLISHED = {
    "llama3_8b": "Llama-3-8B",
    "llama3_70b": "Llama-3-70B",
    "llama3_1_8b": "Llama3.1-8B",
    "llama3_1_70b": "Llama3.1-70B",
    "llama3_1_405b": "Llama3.1-405B",
    "llama3_2_1b": "Llama3.2-1B",
    "llama3_2_3b": "Llama3.2-3B",
    "llama3_3_70b": "Llama3.3-70B-Instruct",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_params_json_equals_the_published_one(name: str, tmp_path: Path) -> None:
    import yaml
    from pydantic import TypeAdapter

    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())["model"]
    model = TypeAdapter(ModelConfig).validate_python(values)
    published = resolve_model(PUBLISHED[name])
    assert published is not None
    assert to_meta(model) == published.arch_args
    # They are read back unchanged, including the factor of the RoPE scaling.
    path = tmp_path / "params.json"
    path.write_text(json.dumps(to_meta(model)))
    found = from_meta(path, model.vocab_size, model.ffn_dim, model.tie_embeddings)
    assert dataclasses.replace(found, name=model.name) == model


@given(dim=st.integers(2, 20_000), ffn_dim=st.integers(1, 80_000))
def test_meta_ffn_factors_reproduce_any_width(dim: int, ffn_dim: int) -> None:
    assert meta_ffn_dim(dim, *_meta_ffn_factors(dim, ffn_dim)) == ffn_dim


# ---------------------------------------------------------------- invalid input


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_file_with_code_is_rejected_without_executing_it(tmp_path: Path) -> None:
    made = RandomWeights(SMALL)
    write_meta_by_hand(made, tmp_path / "meta", 1, **EXTRA_PARAMS)
    part = tmp_path / "meta" / "consolidated.00.pth"
    torch.save({**meta_parts(made, 1)[0], "norm.weight": Malice(tmp_path / "ran")}, part)
    with pytest.raises(FormatError, match="could execute code, so it is not loaded"):
        open_weights(tmp_path / "meta")
    assert not (tmp_path / "ran").exists()
    torch.load(part, weights_only=False)  # verifies that the file does contain code
    assert (tmp_path / "ran").exists()


def truncate(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    os.truncate(path, path.stat().st_size - 1000)


def drop_tensors(folder: Path) -> None:
    torch.save({"tok_embeddings.weight": torch.zeros(3)}, folder / "consolidated.01.pth")


def change_params(**changes: object) -> Any:
    def change(folder: Path) -> None:
        values = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps(values | changes))

    return change


INVALID = {
    "truncated": (truncate, "consolidated.01.pth is damaged"),
    "a part missing": (
        lambda f: (f / "consolidated.00.pth").unlink(),
        "not numbered consecutively from",
    ),
    "no params": (lambda f: (f / "params.json").unlink(), "params.json cannot be read"),
    "broken params": (lambda f: (f / "params.json").write_text("{"), "params.json cannot be read"),
    "parts disagree": (drop_tensors, "contain different tensors"),
    "no tensors": (lambda f: torch.save([1], f / "consolidated.01.pth"), "not a dictionary of"),
    "layers": (change_params(n_layers=3), "missing: layers.2.attention.wq.weight"),
    "too few layers": (change_params(n_layers=1), "unknown: layers.1.attention.wq.weight"),
    "vocabulary": (change_params(vocab_size=99), r"tok_embeddings.weight \[144, 64\], not \[99, "),
    "width": (
        change_params(multiple_of=64),
        "give a feed-forward width of 128, but the tensors have 96",
    ),
    "factor": (
        change_params(dim=2**40, ffn_dim_multiplier=[0.5]),  # a product of 2^40 elements
        "give a feed-forward width of None",
    ),
    "heads": (change_params(n_heads=5), "model.n_heads"),
    "text": (change_params(norm_eps="small"), "norm_eps"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_folder_is_rejected_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    write_meta_by_hand(RandomWeights(SMALL), tmp_path / "meta", 2, **EXTRA_PARAMS)
    damage, message = INVALID[case]
    damage(tmp_path / "meta")
    with pytest.raises(FormatError, match=message):
        convert(open_weights(tmp_path / "meta"), None, tmp_path / "out", "native")
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def metas_apply_scaling() -> Any:
    """Return Meta's function, without importing its module, which needs fairscale."""
    source = (Path(llama_models.__path__[0]) / "llama3" / "model.py").read_text()
    nodes = ast.parse(source).body
    (function,) = (node for node in nodes if getattr(node, "name", "") == "apply_scaling")
    names: dict[str, Any] = {"torch": torch}
    exec(ast.unparse(function), names)
    return names["apply_scaling"]


@pytest.mark.parametrize(
    ("scaling", "warns"),
    [
        (None, False),
        (RopeScaling(8.0), False),
        (RopeScaling(32.0), True),  # Llama 3.2
        (RopeScaling(8.0, low_freq_factor=2.0), True),
        (RopeScaling(8.0, original_max_seq_len=4096), True),
    ],
)
def test_warning_says_whether_metas_code_computes_the_same_model(
    scaling: RopeScaling | None, warns: bool
) -> None:
    model = dataclasses.replace(SMALL, rope_scaling=scaling, max_seq_len=64)
    ours = rope_frequencies(model)
    theirs = 1.0 / (
        model.rope_theta ** (torch.arange(0, model.head_dim, 2).float() / model.head_dim)
    )
    if scaling is not None:
        theirs = metas_apply_scaling()(theirs)
    assert torch.allclose(ours.float(), theirs, rtol=1e-5) is not warns
    assert (meta_rope_warning(model) is not None) is warns
