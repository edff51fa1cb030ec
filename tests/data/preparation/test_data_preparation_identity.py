"""A prepared folder is compared with its source files: by content, not by path or time."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.manifest import Manifest
from data.preparation.pipeline import prepare
from data.sources import corpora, fingerprints
from data.sources.fingerprints import SOURCES_FILE

BYTE = TokenizerConfig("byte", 272)
TEXTS = {"a.txt": "alpha\n" * 50, "b.txt": "beta\n" * 60, "sub/c.txt": "gamma\n" * 70}


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Return the configuration of a prepared dataset of three files in two folders."""
    for name, text in TEXTS.items():
        (tmp_path / "books" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "books" / name).write_text(text)
    source = SourceConfig("text", str(tmp_path / "books"))
    data = DataConfig("books", str(tmp_path / "shards"), {"text": source}, validation_fraction=0.2)
    prepare(data, BYTE, progress=False)
    return data


def at(data: DataConfig, path: Path | str) -> DataConfig:
    return replace(data, sources={"text": replace(data.sources["text"], path=str(path))})


def replace_keeping_size_and_time(books: Path) -> None:
    file = books / "b.txt"
    before = file.stat()
    file.write_text(file.read_text().replace("beta", "BETA", 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "added: d.txt": lambda books: (books / "d.txt").write_text("delta"),
    "removed: sub/c.txt": lambda books: (books / "sub" / "c.txt").unlink(),
    "replaced: a.txt": lambda books: (books / "a.txt").write_text("longer\n" * 80),
    "replaced: b.txt": replace_keeping_size_and_time,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_source_files_are_listed_and_the_remedies_work(
    change: str, data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CHANGES[change](tmp_path / "books")
    with pytest.raises(DataError, match="prepared from another revision of the files") as error:
        prepare(data, BYTE, progress=False)
    message = str(error.value)
    assert re.findall(r"^  (.*)$", message, re.MULTILINE) == [change]
    # A run that was trained on these tokens resumes; only a note is printed.
    manifest = prepare(data, BYTE, trained_on=Manifest.read(Path(data.folder)).hash)
    assert change in capsys.readouterr().err
    (other,) = re.findall(r"Use data\.folder=(\S+) ", message)
    assert prepare(replace(data, folder=other), BYTE, progress=False).hash != manifest.hash
    shutil.rmtree(data.folder)
    prepare(data, BYTE, progress=False)
    prepare(data, BYTE, progress=False)


def test_touched_or_missing_sources_and_folders_of_earlier_versions_are_accepted(
    data: DataConfig, tmp_path: Path
) -> None:
    manifest = prepare(data, BYTE, progress=False)
    for file in (tmp_path / "books").rglob("*.txt"):
        os.utime(file, ns=(0, 0))
    assert prepare(data, BYTE, progress=False) == manifest
    shutil.move(tmp_path / "books", tmp_path / "gone")
    assert prepare(data, BYTE, progress=False) == manifest
    assert prepare(at(data, f"{tmp_path}/x/../books/"), BYTE, progress=False) == manifest
    with pytest.raises(DataError, match=r"data\.sources\.text\.path: .*books in the folder"):
        prepare(at(data, tmp_path / "typo"), BYTE, progress=False)
    assert prepare(at(data, tmp_path / "typo"), BYTE, False, trained_on=manifest.hash) == manifest

    shutil.move(tmp_path / "gone", tmp_path / "books")
    (tmp_path / "shards" / SOURCES_FILE).unlink()
    assert prepare(data, BYTE, progress=False) == manifest
    (tmp_path / "books" / "a.txt").write_text("longer\n" * 80)
    with pytest.raises(DataError, match=r"from another revision .*\n  another number of"):
        prepare(data, BYTE, progress=False)
    assert prepare(data, BYTE, progress=False, trained_on=manifest.hash) == manifest
    with pytest.raises(DataError, match=r"data\.sources\.text\.path"):
        prepare(at(data, shutil.copytree(tmp_path / "books", tmp_path / "new")), BYTE, False)
    (tmp_path / "new" / "a.txt").write_text(TEXTS["a.txt"])
    assert prepare(at(data, tmp_path / "new"), BYTE, progress=False) == manifest


def test_one_corpus_is_recognized_at_every_spelling_of_its_path_and_after_a_move(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = prepare(data, BYTE, progress=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("books")
    copy = shutil.copytree(tmp_path / "books", tmp_path / "elsewhere" / "texts")
    for path in ("books", "./books/", "../" + tmp_path.name + "/books", "link", copy):
        assert prepare(at(data, path), BYTE, progress=False) == manifest, path
    assert prepare(at(data, "books/**/*.txt"), BYTE, progress=False) == manifest
    (copy / "sub" / "c.txt").rename(copy / "d.txt")  # a name is not content
    assert prepare(at(data, copy), BYTE, progress=False) == manifest
    (copy / "d.txt").write_text("other")
    with pytest.raises(DataError, match=r"texts \(there: .*books\):\n  added: d.txt\n  removed"):
        prepare(at(data, copy), BYTE, progress=False)


def test_tokenizer_is_recognized_by_its_content(data: DataConfig, tmp_path: Path) -> None:
    bpe = TokenizerConfig("bpe", 280, training_characters=10_000)
    trained = replace(data, folder=str(tmp_path / "bpe"))
    manifest = prepare(trained, bpe, progress=False)
    copy = tmp_path / "copy.model"
    shutil.copy(tmp_path / "bpe" / "tokenizer.model", copy)
    given = replace(bpe, path=str(copy))
    assert prepare(trained, given, progress=False) == manifest
    own = replace(data, folder=str(tmp_path / "own"))
    assert prepare(own, given, progress=False).hash == manifest.hash
    spelled = f"{tmp_path}/./copy.model"
    assert prepare(own, replace(given, path=spelled), progress=False).hash == manifest.hash
    (tmp_path / "books" / "b.txt").write_text("no such words\n" * 40)
    other = replace(data, folder=str(tmp_path / "other"))
    prepare(other, bpe, progress=False)
    shutil.copy(tmp_path / "other" / "tokenizer.model", copy)
    (tmp_path / "books" / "b.txt").write_text(TEXTS["b.txt"])
    with pytest.raises(DataError, match=r"tokenizer\.path: another tokenizer in the folder"):
        prepare(own, given, progress=False)
    copy.unlink()  # the folder has its own
    assert prepare(own, given, progress=False).hash == manifest.hash


def test_interrupted_preparation_resumes_at_another_path_and_not_with_other_content(
    data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(corpora, "MIN_PART_BYTES", 100)
    copy = shutil.copytree(tmp_path / "books", tmp_path / "copy")
    interrupted = replace(data, folder=str(tmp_path / "interrupted"), workers=1)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr("data.preparation.pipeline.write_sources", interrupt)
        prepare(interrupted, BYTE, progress=False)
    shutil.copytree(interrupted.folder, tmp_path / "second")
    prepare(at(interrupted, copy), BYTE)
    assert "resuming; 3 of 3 parts are done" in capsys.readouterr().err
    replace_keeping_size_and_time(copy)
    prepare(at(replace(interrupted, folder=str(tmp_path / "second")), copy), BYTE)
    assert "restarting the preparation; changed: input" in capsys.readouterr().err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_change_of_one_byte_is_noticed_anywhere_and_at_the_ends_of_sampled_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(b"x" * 5000)
    file = tmp_path / "large"
    for bounds, changes in ((5000, (0, 63, 2345, 4999)), (512, (0, 63, 4936, 4999))):
        monkeypatch.setattr(fingerprints, "SOURCE_BYTES", bounds)
        monkeypatch.setattr(fingerprints, "MIN_FILE_BYTES", 128)
        monkeypatch.setattr(fingerprints, "BLOCK_BYTES", 64)
        file.write_bytes(content)
        recorded = fingerprints.take_fingerprints([file])
        assert recorded["large"].n_blocks == (0 if bounds == 5000 else 8)
        os.utime(file, ns=(0, 0))
        assert fingerprints.changed_files(recorded, [file], 0) == []
        for changed in changes:
            file.write_bytes(content[:changed] + b"y" + content[changed + 1 :])
            assert fingerprints.changed_files(recorded, [file], 0) == ["replaced: large"]


def test_keys_that_an_earlier_version_did_not_have_count_as_their_defaults(
    data: DataConfig,
) -> None:
    file = Path(data.folder) / "manifest.json"
    values = json.loads(file.read_text())
    del values["sha256"]
    for section in (
        values["configuration"]["data.sources"]["text"],
        values["configuration"]["tokenizer"],
    ):
        del section["streaming" if "streaming" in section else "path"]
    file.write_text(json.dumps(values))
    prepare(data, BYTE, progress=False)
    with pytest.raises(DataError, match=r"streaming: False in the folder, True requested"):
        sources = {"text": replace(data.sources["text"], streaming=True)}
        prepare(replace(data, sources=sources), BYTE, progress=False)


def test_fingerprints_of_a_damaged_file_count_as_absent(data: DataConfig, tmp_path: Path) -> None:
    manifest = Manifest.read(Path(data.folder))
    for content in ("", "[]", json.dumps({"format": "other"})):
        (Path(data.folder) / SOURCES_FILE).write_text(content)
        assert prepare(data, BYTE, progress=False) == manifest
    (tmp_path / "books" / "d.txt").write_text("delta")  # noticed all the same
    with pytest.raises(DataError, match="prepared from another revision of the files"):
        prepare(data, BYTE, progress=False)
