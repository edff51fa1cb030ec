"""Chat templates, generation settings, special tokens and token ids survive conversions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from random_weights import SMALL, RandomWeights

from data.tokenizer import BYTE_RANKS, Tokenizer
from formats import tokenizers
from formats.conversion import convert
from formats.detection import open_weights
from formats.file_names import FORMATS
from formats.metadata import training_settings
from formats.weights import Weights

# A small tokenizer with the special tokens of Llama 3.
LLAMA3 = Tokenizer("llama3", BYTE_RANKS | {b"ab": 256, b"the": 257})
BPE = Tokenizer("bpe", LLAMA3.ranks)
MODEL = dataclasses.replace(SMALL, vocab_size=LLAMA3.vocab_size)
EOS = [LLAMA3.eos_id, LLAMA3.specials["<|eom_id|>"], LLAMA3.specials["<|eot_id|>"]]
MESSAGES = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes?"}]


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def published(folder: Path) -> Path:
    """Write a Hugging Face folder as it is published: with details that our export lacks."""
    convert(RandomWeights(MODEL), LLAMA3, folder, "hf")
    edits: dict[str, dict[str, Any]] = {
        "config.json": {"eos_token_id": EOS[1:], "pad_token_id": 7},
        "generation_config.json": {"eos_token_id": EOS, "temperature": 0.6, "do_sample": True},
        "tokenizer_config.json": {"chat_template": "{{ messages }}", "eos_token": "<|eot_id|>"},
        "special_tokens_map.json": {"eos_token": {"content": "<|eot_id|>", "lstrip": False}},
    }
    for name, edit in edits.items():
        (folder / name).write_text(json.dumps(read(folder, name) | edit))
    (folder / "chat_template.jinja").write_text("{{ messages }} in a file")
    tokens = read(folder, "tokenizer.json")
    tokens["added_tokens"][20]["content"] = "<|im_start|>"  # a reserved token with another name
    (folder / "tokenizer.json").write_text(json.dumps(tokens))
    return folder


def converted(source: Path, target: Path, *formats: Any) -> Path:
    for index, format in enumerate(formats):
        weights = open_weights(source)
        step = target / f"{index}-{format}"
        convert(weights, LLAMA3, step, format)
        source = step
    return source


KEPT = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.mark.parametrize("formats", [("hf",), ("native", "hf"), ("native", "native", "hf", "hf")])
def test_files_of_a_hugging_face_folder_are_kept(formats: tuple[str, ...], tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    found = converted(source, tmp_path, *formats)
    for name in (*KEPT, "tokenizer.json", "chat_template.jinja"):
        assert (found / name).read_bytes() == (source / name).read_bytes(), name
    ids = {key: read(found, "config.json")[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    assert ids == {"bos": LLAMA3.bos_id, "eos": EOS[1:], "pad": 7}


def test_token_ids_are_never_null_if_the_source_has_them(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    for format in FORMATS:  # without a tokenizer
        convert(open_weights(source), None, tmp_path / format, format)
    convert(open_weights(tmp_path / "native"), None, tmp_path / "again", "hf")
    for folder in (tmp_path / "hf", tmp_path / "again"):
        assert read(folder, "config.json")["eos_token_id"] == EOS[1:]
        assert read(folder, "config.json")["bos_token_id"] == LLAMA3.bos_id
        assert not (folder / "tokenizer.json").exists()
    # A checkpoint records its tokenizer; tokenizer_path=null writes only the ids.
    convert(RandomWeights(MODEL), BPE, tmp_path / "bpe", "native")
    convert(open_weights(tmp_path / "bpe"), None, tmp_path / "bpe_hf", "hf")
    config = read(tmp_path / "bpe_hf", "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (BPE.bos_id, BPE.eos_id)


def test_files_of_another_tokenizer_are_not_kept(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    other = Tokenizer("llama3", BYTE_RANKS | {b"xy": 256, b"yz": 257})
    convert(open_weights(source), other, tmp_path / "other", "hf")
    assert "chat_template" not in read(tmp_path / "other", "tokenizer_config.json")
    assert not (tmp_path / "other" / "chat_template.jinja").exists()
    assert read(tmp_path / "other", "config.json")["eos_token_id"] == EOS


@pytest.mark.parametrize("formats", [("hf",), ("native", "hf")])
def test_instruct_models_of_meta_get_a_chat_template(
    formats: tuple[str, ...], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    for name in ("Llama3.1-8B", "Llama3.1-8B-Instruct"):
        convert(RandomWeights(MODEL), LLAMA3, tmp_path / name, "meta")
    base = converted(tmp_path / "Llama3.1-8B", tmp_path / "base", *formats)
    assert "chat_template" not in read(base, "tokenizer_config.json")
    found = converted(tmp_path / "Llama3.1-8B-Instruct", tmp_path / "chat", *formats)
    assert read(found, "tokenizer_config.json")["eos_token"] == "<|eot_id|>"
    assert read(found, "generation_config.json")["eos_token_id"] == EOS
    text = AutoTokenizer.from_pretrained(found).apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert text == (
        "<|begin_of_text|>" + header.format("user") + "Hi<|eot_id|>"
        f"{header.format('assistant')}Yes?<|eot_id|>{header.format('assistant')}"
    )


def test_run_that_started_from_weights_exports_their_files(tmp_path: Path) -> None:
    source = published(tmp_path / "source")
    convert(RandomWeights(MODEL), LLAMA3, tmp_path / "run", "native")
    weights = open_weights(tmp_path / "run")
    weights.config = {**weights.config, "run": {"init_from": str(source)}}
    convert(weights, LLAMA3, tmp_path / "hf", "hf")
    for name in (*KEPT, "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes(), name
    weights.config = {**weights.config, "run": {"init_from": "gone"}}
    convert(weights, LLAMA3, tmp_path / "without", "hf")
    assert not (tmp_path / "without" / "chat_template.jinja").exists()


def test_conversions_keep_the_settings_of_held_out_loss(tmp_path: Path) -> None:
    """In any order of formats; weights without a training run have none."""
    settings = {"seq_len": 64, "document_mask": False}
    weights: Weights = RandomWeights(MODEL)
    weights.config = {"train": {"seq_len": 64}, "data": {"document_mask": False}}
    for index, format in enumerate((*FORMATS, *FORMATS)):
        folder = tmp_path / str(index)
        convert(weights, None, folder, format)
        weights = open_weights(folder)
        assert training_settings(weights) == settings
        assert "train" not in weights.config
    convert(RandomWeights(MODEL), None, tmp_path / "without", "hf")
    assert training_settings(open_weights(tmp_path / "without")) == {}


def test_template_is_the_one_of_metas_chat_format() -> None:
    chat_format = pytest.importorskip("llama_models.llama3.chat_format")
    datatypes = pytest.importorskip("llama_models.datatypes")
    meta = pytest.importorskip("llama_models.llama3.tokenizer").Tokenizer.get_instance()
    from jinja2 import Template

    text = Template(tokenizers.LLAMA3_CHAT_TEMPLATE).render(
        messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
        bos_token="<|begin_of_text|>",
        add_generation_prompt=True,
    )
    dialog = [
        datatypes.RawMessage(role="user", content="Hi"),
        datatypes.RawMessage(role="assistant", content="Yes?", stop_reason="end_of_turn"),
    ]
    expected = chat_format.ChatFormat(meta).encode_dialog_prompt(dialog).tokens
    assert meta.encode(text, bos=False, eos=False, allowed_special="all") == expected
