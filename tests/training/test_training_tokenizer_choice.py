"""The tokenizer of `run.init_from` and `tokenizer.path`, and the default dataset folder."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from random_weights import SMALL, RandomWeights

from cli.arguments import CONF, hydra_arguments
from cli.config import load_prepare_config, load_train_config
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.manifest import MANIFEST_FILE
from data.preparation.pipeline import prepare
from data.tokenizer import BYTE_RANKS, Tokenizer, load_tokenizer, ready_tokenizer
from formats.conversion import convert
from formats.tokenizers import resolve_tokenizer
from training.config import JobConfig
from training.config_validation import ConfigError
from training.tokenizer_choice import LLAMA3_HASH, tokenizer_overrides, with_existing_folder

RANKS = BYTE_RANKS | {b"ab": 256, b"abc": 257, b"th": 258, b"the": 259}
BPE = Tokenizer("bpe", RANKS)
OTHER = Tokenizer("bpe", BYTE_RANKS | {b"ba": 256, b"xx": 257, b"yy": 258, b"zz": 259})
MODEL = dataclasses.replace(SMALL, vocab_size=BPE.vocab_size)
FILES = {"native": "tokenizer.model", "hf": "tokenizer.json", "meta": "tokenizer.model"}


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parent = tmp_path_factory.mktemp("weights")
    for format in FILES:
        convert(RandomWeights(MODEL), BPE, parent / format, format)  # type: ignore[arg-type]
    convert(RandomWeights(MODEL), OTHER, parent / "other", "hf")
    return parent


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(*arguments: str) -> JobConfig:
    typed = hydra_arguments(list(arguments), "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *typed])
        return load_train_config(compose("train", typed))


@pytest.mark.parametrize("format", FILES)
def test_run_takes_the_tokenizer_of_its_initial_weights(format: str, folders: Path) -> None:
    config = load(f"run.init_from={folders / format}")
    path = str(folders / format / FILES[format])
    assert config.tokenizer == TokenizerConfig("bpe", BPE.vocab_size, path)
    assert config.model.vocab_size == BPE.vocab_size
    ready = ready_tokenizer(config.tokenizer)
    assert ready is not None and ready.hash == BPE.hash
    assert config.data.folder == f"shards/stdlib-bpe-{BPE.vocab_size}-{BPE.hash[:8]}"


def test_explicit_tokenizer_wins_over_that_of_the_initial_weights(folders: Path) -> None:
    init_from = f"run.init_from={folders / 'hf'}"
    assert load(init_from, "tokenizer=byte").tokenizer.name == "byte"
    assert load(init_from, "tokenizer.vocab_size=276").tokenizer.path is None  # to be trained
    other = load(init_from, f"tokenizer.path={folders / 'other'}")
    assert other.tokenizer.path == str(folders / "other")
    assert other.data.folder.endswith(OTHER.hash[:8])
    assert load(init_from, "data.folder=mine").data.folder == "mine"


def test_weights_without_a_tokenizer_or_absent_leave_the_configured_one(folders: Path) -> None:
    convert(RandomWeights(MODEL), None, folders / "none", "hf")
    for init_from in (folders / "none", Path("nowhere")):
        config = load(f"run.init_from={init_from}", "model.vocab_size=4096")
        assert config.tokenizer == TokenizerConfig("bpe", 4096)
    # Weights that were deleted since the run started: its own checkpoint has their tokenizer.
    step = Path("runs/mine/checkpoints/step-00000003")
    step.parent.mkdir(parents=True)
    convert(RandomWeights(MODEL), BPE, step, "native")
    config = load("run.init_from=nowhere", "run.name=mine")
    assert config.tokenizer.vocab_size == BPE.vocab_size
    assert load("run.init_from=runs/mine").tokenizer.vocab_size == BPE.vocab_size  # a run folder


def test_tokenizer_path_may_be_a_run(folders: Path) -> None:
    run = Path("runs/mine")
    shutil.copytree(folders / "native", run / "checkpoints" / "step-00000001")
    for path in (run, run / "checkpoints", run / "checkpoints" / "step-00000001"):
        config = load(f"tokenizer.path={path}", "tokenizer=bpe")
        assert config.tokenizer.vocab_size == BPE.vocab_size
        for found in (ready_tokenizer(config.tokenizer), resolve_tokenizer(folders, str(path))):
            assert found is not None and found.hash == BPE.hash


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("format", FILES)
def test_tokenizer_path_is_a_file_or_a_folder_in_any_format(
    format: str, kind: str, folders: Path
) -> None:
    path = folders / format / (FILES[format] if kind == "file" else "")
    config = load(f"tokenizer.path={path}", "tokenizer=bpe")
    assert (config.tokenizer.name, config.tokenizer.vocab_size) == ("bpe", BPE.vocab_size)
    for found in (
        ready_tokenizer(config.tokenizer),
        load_tokenizer(config.tokenizer, "nowhere"),
        resolve_tokenizer(folders, str(path)),  # tokenizer_path of the other programs
    ):
        assert found is not None and found.hash == BPE.hash


def test_tokenizer_path_that_is_none_is_named_with_a_remedy(folders: Path, tmp_path: Path) -> None:
    def errors_of(*arguments: str) -> str:
        with pytest.raises(ConfigError) as raised:
            load(*arguments)
        return str(raised.value)

    path = folders / "hf" / "tokenizer.json"
    error = errors_of(f"tokenizer.path={path}", "tokenizer.vocab_size=999")
    assert f"tokenizer.vocab_size=999 differs from {path}; use {BPE.vocab_size}" in error
    assert load(f"tokenizer.path={path}", f"tokenizer.vocab_size={BPE.vocab_size}")
    error = errors_of(f"tokenizer.path={path}", "tokenizer=byte")
    assert f"tokenizer=byte differs from tokenizer.path={path}, which is bpe" in error
    error = errors_of(f"tokenizer.path={tmp_path}")
    assert f"{tmp_path} contains neither tokenizer.model nor tokenizer.json" in error
    assert "tokenizer.path=gone.json does not exist" in errors_of("tokenizer.path=gone.json")
    for name in ("tokenizer.json", "tokenizer.model"):
        pointer = tmp_path / "cloned" / name
        pointer.parent.mkdir(exist_ok=True)
        pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        error = errors_of(f"tokenizer.path={pointer}")
        assert f"{pointer} is a Git LFS pointer; download the file with `git lfs pull`" in error
    pointer.write_bytes(path.read_bytes())
    error = errors_of(f"tokenizer.path={pointer}")
    assert "tokenizer.model is JSON, " in error and "rename it so that it ends in .json" in error
    renamed = pointer.rename(tmp_path / "cloned" / "mine.json")
    assert load(f"tokenizer.path={renamed}").tokenizer.vocab_size == BPE.vocab_size
    assert "tokenizer.path=gone.model does not exist" in errors_of("tokenizer.path=gone.model")
    assert load("tokenizer.path=gone.model", "tokenizer.vocab_size=300")  # data may be prepared
    sentencepiece = tmp_path / "tokenizer.model"
    sentencepiece.write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\xff")
    error = errors_of(f"run.init_from={tmp_path}")
    assert "is a SentencePiece model, as in Llama 1, Llama 2 and Mistral" in error


def test_two_trained_vocabularies_have_two_default_folders() -> None:
    def folder(*arguments: str) -> str:
        return load_prepare_config(compose("prepare", list(arguments))).data.folder

    assert folder("tokenizer.vocab_size=512") == "shards/stdlib-bpe-512"
    assert folder() == "shards/stdlib-bpe-4096"
    assert folder("tokenizer=llama3") == "shards/stdlib-llama3-128256"


def test_folder_prepared_under_an_older_default_name_is_used(tmp_path: Path) -> None:
    Path("text").mkdir()
    for name in "ab":
        Path(f"text/{name}.txt").write_text("the cat sat on the mat, abc. " * 40)
    data = DataConfig(
        "books", "shards/books-bpe", {"text": SourceConfig("text", "text")}, shard_tokens=1000
    )
    trained = TokenizerConfig("bpe", 280)
    prepare(dataclasses.replace(data, validation_fraction=0), trained, progress=False)
    now = dataclasses.replace(data, folder="shards/books-bpe-280", validation_fraction=0)
    assert with_existing_folder(now, trained).folder == "shards/books-bpe"
    # Also if the corpus moved, without another change.
    Path("text").rename("moved")
    moved = dataclasses.replace(now, sources={"text": SourceConfig("text", "moved")})
    assert with_existing_folder(moved, trained).folder == "shards/books-bpe"
    Path("moved/c.txt").write_text("more")
    assert with_existing_folder(moved, trained) == moved
    Path("moved/c.txt").unlink()
    Path("moved").rename("text")
    # Not for another configuration, and not if the new folder exists.
    other = dataclasses.replace(now, folder="shards/books-bpe-281")
    assert with_existing_folder(other, TokenizerConfig("bpe", 281)) == other
    more = dataclasses.replace(now, validation_fraction=0.5)
    assert with_existing_folder(more, trained) == more
    # The same tokenizer, as the file of a checkpoint; and another one of that size.
    file = tmp_path / "shards/books-bpe/tokenizer.model"
    tokens = ready_tokenizer(TokenizerConfig("bpe", 280, str(file)))
    assert tokens is not None
    hashed = dataclasses.replace(now, folder=f"shards/books-bpe-280-{tokens.hash[:8]}")
    assert (
        with_existing_folder(hashed, TokenizerConfig("bpe", 280, str(file))).folder == data.folder
    )
    Path("other").mkdir()
    convert(RandomWeights(dataclasses.replace(MODEL, vocab_size=280)), None, Path("w"), "hf")
    Path("other/tokenizer.model").write_bytes(
        Tokenizer("bpe", BYTE_RANKS | {bytes([i, i]): 256 + i for i in range(8)}).files()[
            "tokenizer.model"
        ]
    )
    assert with_existing_folder(hashed, TokenizerConfig("bpe", 280, "other")) == hashed
    # An interrupted preparation under the old name is resumed there.
    manifest = json.loads((Path(data.folder) / MANIFEST_FILE).read_text())
    (Path(data.folder) / MANIFEST_FILE).unlink()
    marker = {"configuration": manifest["configuration"], "tokenizer": None}
    (Path(data.folder) / "preparing.json").write_text(json.dumps(marker))
    assert with_existing_folder(now, trained).folder == data.folder


def test_the_hash_of_metas_tokenizer_is_known() -> None:
    pytest.importorskip("llama_models")
    llama3 = ready_tokenizer(TokenizerConfig("llama3", 128_256))
    assert llama3 is not None and llama3.hash == LLAMA3_HASH


def test_initial_weights_of_a_wrong_type_are_left_to_validation() -> None:
    """They may come from a damaged `config.yaml`."""
    init_from: Any = 3
    assert tokenizer_overrides({"name": "bpe", "path": None}, set(), init_from, "runs/x") == {}
