"""Weight files: which of several exports is read, tied outputs, `.bin` files, leftovers."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import KINDS, SMALL, RandomWeights, assert_same_weights, tokens_of
from random_weights import filled as our_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from formats.conversion import convert
from formats.detection import open_weights
from formats.errors import FormatError
from formats.file_names import FORMATS
from formats.hugging_face import hugging_face_name, permuted, to_halves
from formats.hugging_face_files import read_tensors
from formats.native import write_native
from formats.weights import Weights, load_weights
from model.llama import Llama

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TIED = KINDS["tied"]


def exported(folder: Path, made: RandomWeights, **settings: Any) -> Path:
    convert(made, None, folder, "hf", **settings)
    return folder


def tensors_of(made: Weights) -> dict[str, torch.Tensor]:
    """Return the tensors by Hugging Face's names."""
    stored = permuted(made.tensors, made.model.head_dim, to_halves)
    return {hugging_face_name(name): tensor.read() for name, tensor in stored.items()}


def transformers_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder, dtype="auto")(tokens_of(TIED)).logits


def our_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return our_model(open_weights(folder))(tokens_of(TIED))


# ---------------------------------------------------------------- tied embeddings


@pytest.mark.parametrize(("sharded", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_tied_model_with_another_stored_output_is_untied_like_in_transformers(
    sharded: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    made = RandomWeights(TIED, dtype)
    tensors = tensors_of(made)
    output = tensors["model.embed_tokens.weight"].clone()
    output[3, 5] += 0.25
    folder = exported(tmp_path / "hf", made, file_bytes=60_000 if sharded else 10**9)
    if sharded:
        save_file({"lm_head.weight": output}, folder / "more.safetensors")
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = "more.safetensors"
        (folder / INDEX).write_text(json.dumps(index))
    else:
        save_file(tensors | {"lm_head.weight": output}, folder / SINGLE, {"format": "pt"})
    weights = open_weights(folder)
    assert not weights.model.tie_embeddings
    assert "tie_word_embeddings=true, but lm_head.weight differs" in weights.warnings[-1]
    assert torch.equal(weights.tensors["output.weight"].read(), output)
    if dtype == torch.float32:
        torch.testing.assert_close(our_logits(folder), transformers_logits(folder))
    # The conversion keeps both, in every format.
    for format in FORMATS:
        convert(weights, None, tmp_path / format / "out", format)
        assert_same_weights(open_weights(tmp_path / format / "out"), weights)


def test_output_equal_to_the_embedding_is_tied_and_may_replace_it(tmp_path: Path) -> None:
    made = RandomWeights(TIED)
    folder = exported(tmp_path / "hf", made)
    tensors = tensors_of(made)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert_same_weights(open_weights(folder), made)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert_same_weights(open_weights(folder), made)
    assert not open_weights(folder).warnings[1:]


def test_tied_native_checkpoint_with_another_stored_output_is_untied(tmp_path: Path) -> None:
    untied = RandomWeights(KINDS["scaled"])
    tied = dataclasses.replace(untied.model, tie_embeddings=True)
    write_native(tied, untied.tensors, None, tmp_path)
    weights = open_weights(tmp_path)
    assert not weights.model.tie_embeddings
    assert "output.weight differs from tok_embeddings.weight" in weights.warnings[0]
    assert "output.weight" in weights.tensors


# ---------------------------------------------------------------- several exports in one folder


def test_single_file_is_read_instead_of_a_stale_index_like_in_transformers(tmp_path: Path) -> None:
    old = exported(tmp_path / "hf", RandomWeights(TIED), file_bytes=60_000)
    new = RandomWeights(TIED)
    for tensor in new.values.values():
        tensor.mul_(0.5)
    save_file(tensors_of(new), old / SINGLE, {"format": "pt"})
    assert_same_weights(open_weights(old), new)
    torch.testing.assert_close(our_logits(old), transformers_logits(old))
    assert "model.safetensors is read" in open_weights(old).warnings[0]
    for path in old.glob("model-0*"):
        path.unlink()
    assert_same_weights(open_weights(old), new)  # an index without its files
    assert open_weights(old).warnings == []
    (old / INDEX).write_text("")  # nor is a damaged index next to a single file
    assert_same_weights(open_weights(old), new)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_bin_files_are_read(sharded: bool, tmp_path: Path) -> None:
    made = RandomWeights(KINDS["scaled"], torch.bfloat16)
    folder = exported(tmp_path / "hf", made)
    stale_index = (folder / INDEX).read_text()
    for path in folder.glob("model*"):
        path.unlink()
    tensors = tensors_of(made)
    if sharded:
        names = list(tensors)
        files = {name: f"pytorch_model-0000{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            part = {name: tensors[name] for name in names if files[name] == file}
            torch.save(part, folder / file)
        index = json.dumps({"weight_map": files})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    assert_same_weights(open_weights(folder), made)
    (folder / INDEX).write_text(stale_index)  # none of its files exists
    assert_same_weights(open_weights(folder), made)
    convert(open_weights(folder), None, tmp_path / "safe", "hf")
    assert_same_weights(open_weights(tmp_path / "safe"), made)


class Code:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def _without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def _bin_with_code(folder: Path) -> None:
    _without_weights(folder)
    torch.save({"a": Code()}, folder / "pytorch_model.bin")


def _lfs_pointer(folder: Path) -> None:
    _without_weights(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / SINGLE).write_text(pointer)


def _file_of_another_export(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("model-*"))
    save_file(load_file(first) | load_file(second), second)


def _adapter(folder: Path) -> None:
    values = {"peft_type": "LORA", "base_model_name_or_path": "meta-llama/Llama-3.1-8B"}
    (folder / "adapter_config.json").write_text(json.dumps(values))


def _only_adapter(folder: Path) -> None:
    _without_weights(folder)
    (folder / "config.json").unlink()
    _adapter(folder)


def _gguf(folder: Path) -> None:
    _only_adapter(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")


def _original(folder: Path) -> None:
    _only_adapter(folder)
    (folder / "adapter_config.json").unlink()
    convert(RandomWeights(SMALL), None, folder / "original", "meta")


def _both_formats(folder: Path) -> None:
    convert(RandomWeights(SMALL), None, folder / "original", "meta")
    for path in (folder / "original").iterdir():
        path.rename(folder / path.name)


def _consolidated(folder: Path) -> None:
    _original(folder)
    shutil.rmtree(folder / "original")
    (folder / "consolidated.safetensors").write_bytes(b"")


def _other_frameworks(folder: Path) -> None:
    _without_weights(folder)
    (folder / "tf_model.h5").write_bytes(b"")


def _dangling_link(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / SINGLE).symlink_to("../blobs/gone")


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "code in a bin file": (_bin_with_code, "pytorch_model.bin contains objects other than tensors"),
    "dangling link": (_dangling_link, "is a link to ../blobs/gone, which does not exist"),
    "Git LFS pointer": (_lfs_pointer, "is a Git LFS pointer, not the file itself; run git lfs"),
    "a file of another export": (_file_of_another_export, "both contain .*of different exports"),
    "adapter next to weights": (_adapter, "peft_type=LORA is an adapter of base_model_name_or_"),
    "adapter alone": (_only_adapter, "base_model_name_or_path=meta-llama/Llama-3.1-8B"),
    "GGUF": (_gguf, "is in GGUF format, which is not supported; use the weights from which"),
    "original": (_original, "contains no weights, but .*hf/original does; use .*hf/original"),
    "both formats": (_both_formats, "contains weights in two formats.* move one of them"),
    "consolidated.safetensors": (_consolidated, "consolidated.safetensors is not supported"),
    "other frameworks": (_other_frameworks, r"or its index \(only tf_model.h5\); download them"),
}


@pytest.mark.parametrize("case", CASES)
def test_folder_that_cannot_be_read_is_named_with_a_remedy(case: str, tmp_path: Path) -> None:
    folder = exported(tmp_path / "hf", RandomWeights(SMALL), file_bytes=60_000)
    change, message = CASES[case]
    change(folder)
    with pytest.raises(FormatError, match=message):
        open_weights(folder)


def test_path_of_a_weight_file_names_its_folder(tmp_path: Path) -> None:
    folder = exported(tmp_path / "hf", RandomWeights(SMALL))
    (file,) = folder.glob("*.safetensors")
    with pytest.raises(FormatError, match=f"is a file; use its folder {folder}"):
        open_weights(file)
    with pytest.raises(FormatError, match="is in GGUF format"):
        open_weights(folder / "model.gguf")


def test_meta_part_of_another_size_is_named(tmp_path: Path) -> None:
    made = RandomWeights(SMALL)
    for parts in (1, 2):
        convert(made, None, tmp_path / str(parts), "meta", parts=parts)
    shutil.copy(tmp_path / "2" / "consolidated.01.pth", tmp_path / "1")
    with pytest.raises(FormatError, match=r"in consolidated.00.pth and .* in consolidated.01.pth"):
        open_weights(tmp_path / "1")
    (tmp_path / "1" / "consolidated.01.pth").unlink()
    assert_same_weights(open_weights(tmp_path / "1"), made)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("format", ["native", "hf", "meta"])
@pytest.mark.parametrize(
    ("values", "kinds"),
    [([math.nan], "NaN"), ([math.inf, -math.inf, math.nan], "NaN and infinite")],
)
def test_non_finite_weights_are_named_and_not_converted(
    format: Any, values: list[float], kinds: str, tmp_path: Path
) -> None:
    made = RandomWeights(SMALL, torch.bfloat16)
    name = "layers.1.attention.wk.weight"
    made.values[name][7, : len(values)] = torch.tensor(values)
    with pytest.raises(FormatError, match=rf"made: {name} contains {kinds} values; use an"):
        convert(made, None, tmp_path / "out", format)
    made.format = "hf"  # a native checkpoint would be verified on disk first
    with pytest.raises(FormatError, match=rf"{name} contains {kinds} values"):
        load_weights(Llama(SMALL), made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["native", "hf", "meta"])
def test_values_that_overflow_the_target_data_type_are_refused(format: Any, tmp_path: Path) -> None:
    made = RandomWeights(SMALL, torch.bfloat16)
    made.values["layers.0.feed_forward.w2.weight"][3, 5] = -70_000
    message = r"layers.0.feed_forward.w2.weight has values up to 70144, which dtype=fp16 cannot"
    with pytest.raises(FormatError, match=message):
        convert(made, None, tmp_path / "out", format, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    # The remedies of the message.
    convert(made, None, tmp_path / "bf16", format, dtype=torch.bfloat16)
    convert(made, None, tmp_path / "stored", format)
    wide = RandomWeights(SMALL)
    wide.values["norm.weight"][0] = 3.4e38  # above the largest bfloat16
    # dtype=bf16 is no remedy here.
    with pytest.raises(
        FormatError, match=r"up to 3.4e\+38, which dtype=bf16 .*; use dtype=null to"
    ):
        convert(wide, None, tmp_path / "out", format, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_index_with_a_name_that_no_file_has_is_rejected(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match=r"model\.safetensors\.index\.json"):
        read_tensors(tmp_path)
