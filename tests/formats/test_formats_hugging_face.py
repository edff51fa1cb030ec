"""Hugging Face folders: lossless round trips, transformers compatibility, rejected input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import (
    KINDS,
    SMALL,
    RandomWeights,
    assert_same_weights,
    filled,
    same_bits,
    tokens_of,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from formats.conversion import convert
from formats.detection import open_weights
from formats.errors import FormatError
from formats.weights import fingerprint

FILE_BYTES = 60_000  # small enough for several files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_native_to_hugging_face_is_bit_exact(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = RandomWeights(KINDS[kind], dtype)
    convert(made, None, tmp_path / "native", "native")
    native = open_weights(tmp_path / "native")
    convert(native, None, tmp_path / "hf", "hf", file_bytes=FILE_BYTES)
    exported = open_weights(tmp_path / "hf")
    convert(exported, None, tmp_path / "again", "native")
    again = open_weights(tmp_path / "again")
    assert (native.format, exported.format, again.format) == ("native", "hf", "native")
    for weights in (native, exported, again):
        assert_same_weights(weights, made)
    assert len({fingerprint(weights) for weights in (made, native, exported, again)}) == 1
    names = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05d}.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_the_export_with_equal_logits_and_its_own_export_is_readable(
    kind: str, tmp_path: Path
) -> None:
    made = RandomWeights(KINDS[kind])
    convert(made, None, tmp_path / "hf", "hf", file_bytes=FILE_BYTES)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype="auto", output_loading_info=True
    )
    theirs, loading_info = loaded
    assert not any(loading_info.values())
    assert theirs.dtype == torch.float32
    tokens = tokens_of(made.model)
    with torch.no_grad():
        expected = theirs(tokens).logits
        logits = filled(open_weights(tmp_path / "hf"))(tokens)
    # Both are float32 with different summation order, as in tests/model/test_model_parity.py.
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    theirs.save_pretrained(tmp_path / "theirs")  # a single file with the newest keys
    assert_same_weights(open_weights(tmp_path / "theirs"), made)


def test_stored_rope_frequencies_and_tied_output_of_old_releases_are_ignored(
    tmp_path: Path,
) -> None:
    made = RandomWeights(KINDS["tied"])
    convert(made, None, tmp_path / "hf", "hf")
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert_same_weights(open_weights(tmp_path / "hf"), made)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in each format."""
    parent = tmp_path_factory.mktemp("formats")
    for format in ("native", "hf", "meta"):
        parts = 4 if format == "meta" else 1
        convert(RandomWeights(SMALL), None, parent / format, format, parts=parts)
    return {format: parent / format for format in ("native", "hf", "meta")}


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_block_equals_the_slice_of_the_full_tensor(
    folders: dict[str, Path], data: st.DataObject
) -> None:
    """A shard may start and end anywhere, also inside a head, or be empty."""
    weights = open_weights(folders[data.draw(st.sampled_from(sorted(folders)))])
    name = data.draw(st.sampled_from(sorted(weights.tensors)))
    offsets, sizes = [], []
    for length in weights.tensors[name].shape:
        offset = data.draw(st.integers(0, length))
        offsets.append(offset)
        sizes.append(data.draw(st.integers(0, length - offset)))
    expected = RandomWeights(SMALL).tensors[name].read(offsets, sizes)
    assert same_bits(weights.tensors[name].read(offsets, sizes), expected)


def test_dtype_conversion_rounds_like_torch(tmp_path: Path) -> None:
    made = RandomWeights(SMALL)
    for format in ("native", "hf", "meta"):
        convert(made, None, tmp_path / format, format, dtype=torch.bfloat16)
        found = open_weights(tmp_path / format)
        for name, tensor in made.values.items():
            assert same_bits(found.tensors[name].read(), tensor.bfloat16())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


# ---------------------------------------------------------------- invalid input


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(folder: Path) -> None:
    content = files_of(folder)[1].read_bytes()
    files_of(folder)[1].write_bytes(content[:-100])


def change_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a function that changes the tensors of the first file and the index."""

    def damage(folder: Path) -> None:
        path = files_of(folder)[0]
        tensors = load_file(path)
        before = set(tensors)
        change(tensors)
        save_file(tensors, path)
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = index["weight_map"]
        names |= dict.fromkeys(tensors, path.name)
        for name in before - set(tensors):
            del names[name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changes))

    return damage


def remove_weights(folder: Path) -> None:
    for path in [*files_of(folder), *folder.glob("*.index.json")]:
        path.unlink()


def list_a_missing_tensor(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = files_of(folder)[0].name
    path.write_text(json.dumps(index))


def prefix_names(folder: Path) -> None:
    """Name the tensors as the state dict of a compiled model does."""
    for path in files_of(folder):
        save_file({f"_orig_mod.{name}": t for name, t in load_file(path).items()}, path)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    names = index["weight_map"]
    path.write_text(json.dumps({"weight_map": {f"_orig_mod.{n}": names[n] for n in names}}))


EMBEDDING = "model.embed_tokens.weight"
INVALID: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, "model-00002-of-.* is damaged"),
    "a file missing": (lambda f: files_of(f)[1].unlink(), "model-00002-of-.* does not exist"),
    "header": (lambda f: files_of(f)[0].write_bytes(b"\xff" * 64), "is damaged"),
    "index": (list_a_missing_tensor, "lists tensors that do not exist .model.layers.7"),
    "broken index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "is not a JSON object",
    ),
    "missing": (change_tensors(lambda t: t.pop(EMBEDDING)), "missing: model.embed_tokens.weight"),
    "extra": (
        change_tensors(lambda t: t.update({"lora.a": torch.ones(2)})),
        "unknown: lora.a",
    ),
    "shape": (
        change_tensors(lambda t: t.update({EMBEDDING: torch.ones(9, 64)})),
        r"embed_tokens.weight \[9, 64\], not \[144, 64\]",
    ),
    "dtype": (
        change_tensors(lambda t: t.update({EMBEDDING: torch.ones(144, 64).double()})),
        "has dtype=F64; use weights in F32, BF16 or F16",
    ),
    "no weights": (
        remove_weights,
        "contains neither model.safetensors nor model.safetensors.index.json",
    ),
    "mistral": (
        change_json("config.json", model_type="mistral", architectures=["MistralForCausalLM"]),
        "model_type=mistral with architectures=MistralForCausalLM is not Llama 3",
    ),
    "classifier": (
        change_json("config.json", architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification",
    ),
    "bias": (change_json("config.json", attention_bias=True), "attention_bias=True"),
    "activation": (change_json("config.json", hidden_act="gelu"), "hidden_act=gelu"),
    "quantised": (change_json("config.json", quantization_config={"bits": 4}), "quantization_"),
    "head_dim": (change_json("config.json", head_dim=32), r"head_dim=32 \(not hidden_size"),
    "yarn": (
        change_json("config.json", rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        "rope_type=yarn",
    ),
    "gptq": (
        change_json("config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantization_config.quant_method=gptq \(use the weights before quantization\)",
    ),
    "linear": (
        change_json("config.json", rope_scaling={"type": "linear", "factor": 2.0}),
        r"rope_scaling.rope_type=linear \(supported: default and llama3\)",
    ),
    "dynamic, as newer releases write it": (
        change_json("config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "rope_type=dynamic",
    ),
    "rope_scaling is no object": (change_json("config.json", rope_scaling=8), "is not an object"),
    "partial rotation": (
        change_json("config.json", partial_rotary_factor=0.5),
        r"partial_rotary_factor=0.5 \(supported: 1\)",
    ),
    "mlp_bias": (change_json("config.json", mlp_bias=True), r"mlp_bias=True \(supported: False\)"),
    "pretraining_tp": (
        change_json("config.json", pretraining_tp=2),
        r"pretraining_tp=2 \(set it to 1 in the file: it only splits matrix products",
    ),
    "qwen": (
        change_json("config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"]),
        "model_type=qwen2 with architectures=Qwen2ForCausalLM is not Llama 3",
    ),
    "no architecture list": (
        change_json("config.json", model_type="gemma", architectures="GemmaForCausalLM"),
        "model_type=gemma with architectures=GemmaForCausalLM is not Llama 3",
    ),
    "a size missing": (
        change_json("config.json", intermediate_size=None),
        "intermediate_size=None: Input should be",
    ),
    "a factor missing": (
        change_json("config.json", rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling.low_freq_factor=None.*original_max_position_embeddings=None",
    ),
    "compiled": (
        prefix_names,
        "the names have the prefix _orig_mod.; save the weights without it",
    ),
    "heads": (change_json("config.json", num_key_value_heads=5), "model.n_kv_heads"),
}


def test_equivalent_values_and_a_byte_order_mark_in_config_json_are_accepted(
    tmp_path: Path,
) -> None:
    convert(RandomWeights(SMALL), None, tmp_path, "hf", overwrite=True)
    change_json("config.json", pretraining_tp=1, hidden_act="swish", architectures=[])(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as Windows editors save it
    assert_same_weights(open_weights(tmp_path), RandomWeights(SMALL))


@pytest.mark.parametrize("case", INVALID)
def test_invalid_folder_is_rejected_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    convert(RandomWeights(SMALL), None, tmp_path / "hf", "hf", file_bytes=FILE_BYTES)
    damage, message = INVALID[case]
    damage(tmp_path / "hf")
    with pytest.raises(FormatError, match=message):
        convert(open_weights(tmp_path / "hf"), None, tmp_path / "out", "native")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


IDS = {"bos_token_id": 1, "eos_token_id": [2, 3]}


def test_config_json_round_trips_through_transformers(tmp_path: Path) -> None:
    from formats.config_json import from_hugging_face, to_hugging_face

    for kind, model in KINDS.items():
        path = tmp_path / kind / "config.json"
        path.parent.mkdir()
        path.write_text(json.dumps(to_hugging_face(model, "bfloat16", IDS)))
        config = LlamaConfig.from_pretrained(path.parent)
        rope: Any = config.rope_parameters
        assert rope["rope_theta"] == model.rope_theta
        assert (config.bos_token_id, config.eos_token_id) == (1, [2, 3])
        scaling = model.rope_scaling
        assert rope["rope_type"] == ("llama3" if scaling else "default")
        LlamaForCausalLM(config)  # has all required keys
        config.save_pretrained(tmp_path / kind / "theirs")
        ours = from_hugging_face(tmp_path / kind / "theirs" / "config.json")
        assert ours.rope_scaling == scaling
        assert ours.max_seq_len == model.max_seq_len
