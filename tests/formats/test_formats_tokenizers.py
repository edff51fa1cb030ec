"""Tokenizer files: equal ids in Hugging Face's libraries, lossless round trips, rejected input."""

import importlib.util
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models

from data.config import TokenizerConfig
from data.tokenizer import (
    BYTE_RANKS,
    MAX_RUN,
    Tokenizer,
    byte_of_character,
    library_split,
    model_file,
    ready_tokenizer,
    split_text,
    train_bpe,
)
from data.tokenizer_json import bpe_merges
from formats.errors import FormatError
from formats.tokenizers import (
    find_tokenizer,
    read_tokenizer_file,
    resolve_tokenizer,
    stop_token_ids,
    write_hugging_face,
)

# The first 768 code points include every first byte of two-byte characters; a sample of the others
# checks that both regex engines classify letters alike.
LOW = [chr(value) for value in range(0x300)]
HIGH = [chr(value) for value in range(0x300, 0x110000, 37) if not 0xD800 <= value < 0xE000]
CORPUS = [
    "",
    "The quick brown fox: it's 12345 o'clock, they'LL say WE'RE late.\r\n\r\n\tIndented  twice \n ",
    "Größere Übung im Fünf-Uhr-Zug; l'été où ça naît; ¿dónde está el niño?; Łódź, żółw; dị ứng",
    "Москва слезам не верит. Η θάλασσα είναι ήσυχη. Բարեւ աշխարհ. შუაღამე. ሰላም ለዓለም።",
    "שָׁלוֹם לכולם، السَّلامُ عَلَيْكُمْ؛ नमस्ते दुनिया। வணக்கம் உலகம் สวัสดีชาวโลก ជំរាបសួរ",
    "今天天气很好,我们去公园吧。きょうは雨です。안녕하세요 세계! Tiếng Việt có nhiều dấu.",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇨🇭 #️⃣",
    "e\u0301a\u0308\u0323o\u0302\u0301 Z̸̧a̵l̷g̶o̴ \u200b\u200d\ufeff\u2028\u2029\u3000\xa0|",
    "1 12 123 1234 12345678901234567890 3.14159e-10 ١٢٣٤ १२३४ ①②③ ⅔ Ⅻ 0x1F 1,000,000.00",
    " " * 200 + "\n" * 100 + "\t" * 50 + " \n \r\n\t \r \n" * 20 + "end" + " " * 77,
    "".join(LOW),
    *(context.replace("_", each) for each in LOW for context in ("_", "'_", "a_b 1_2", " _ _\n_")),
    *(
        "".join(f"{each} {each}a1{each}" for each in HIGH[at : at + 99])
        for at in range(0, len(HIGH), 99)
    ),
    *(file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parents[2].glob("*.py"))),
    *(
        count * each
        for each in ("a", "ab", "aeb", "=", "-*", " a", "the")
        for count in (7, 64, 1000)
    ),
    '{"key": [1, 2.5e-3, null], "π": "\\u00e9"}\n#include <map>\nint main() { return a<<=2; }\n',
]


@dataclass(frozen=True)
class Exported:
    """A tokenizer, the folder it was written to, and the library's tokenizer loaded from it."""

    ours: Tokenizer
    folder: Path
    library: LibraryTokenizer


def made(name: Literal["llama3", "bpe", "byte"]) -> Tokenizer:
    if name == "bpe":
        # Runs of few letters, so that many merge orders are possible.
        letters = "".join(random.Random(0).choices("aaab ", k=20_000))
        return train_bpe([*CORPUS[:10], Path(__file__).read_text(encoding="utf-8"), letters], 1200)
    if name == "llama3" and importlib.util.find_spec("llama_models") is None:
        pytest.skip("needs the package llama-models (extra `llama3`)")
    tokenizer = ready_tokenizer(TokenizerConfig(name, 128_256 if name == "llama3" else 272))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module", params=["byte", "bpe", "llama3"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    tokenizer = made(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    write_hugging_face(tokenizer, folder, 8192)
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    return Exported(tokenizer, folder, library)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    tokenizer, folder = made("bpe"), tmp_path_factory.mktemp("plain_bpe")
    write_hugging_face(tokenizer, folder, 8192)
    return Exported(tokenizer, folder, LibraryTokenizer.from_file(str(folder / "tokenizer.json")))


def library_ids(library: LibraryTokenizer, text: str) -> list[int]:
    return library.encode(text, add_special_tokens=False).ids


def test_exported_ids_equal_ours_on_mixed_corpus(exported: Exported) -> None:
    encoded = exported.library.encode_batch(CORPUS, add_special_tokens=False)
    for text, theirs in zip(CORPUS, encoded, strict=True):
        assert theirs.ids == exported.ours.encode(text), ascii(text)[:200]


@settings(deadline=None, max_examples=300)
@given(text=st.one_of(st.text(), st.text("ab '\n", max_size=200), st.text("aeinrst", max_size=80)))
def test_exported_ids_equal_ours_on_any_text(exported: Exported, text: str) -> None:
    # Hypothesis also draws string constants of our source, such as names of special tokens.
    assume(not any(name in text for name in exported.ours.specials))
    assert library_ids(exported.library, text) == exported.ours.encode(text)


@settings(deadline=None, max_examples=150)
@given(
    tokens=st.lists(st.text("ab", min_size=2, max_size=7), unique=True, max_size=60),
    texts=st.lists(st.text("ab", min_size=1, max_size=60), min_size=20, max_size=20),
)
def test_required_merges_and_all_splits_encode_like_tiktoken(
    tokens: list[str], texts: list[str]
) -> None:
    """Arbitrary rank orders and tokens without a merge, which trained vocabularies rarely have."""
    ranks = BYTE_RANKS | {token.encode(): 256 + i for i, token in enumerate(tokens)}
    splits = [
        (token[:i].encode(), token[i:].encode())
        for token in tokens
        for i in range(1, len(token))
        if {token[:i].encode(), token[i:].encode()} <= ranks.keys()
    ]
    ours, character = Tokenizer("bpe", ranks), {b: c for c, b in byte_of_character().items()}

    def as_text(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    vocabulary = {as_text(token): rank for token, rank in ranks.items()}
    for merges in (bpe_merges(ranks), splits):
        pairs = [(as_text(left), as_text(right)) for left, right in merges]
        library = LibraryTokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
        library.pre_tokenizer = library_split()
        for text in [*texts, *tokens]:
            assert library_ids(library, text) == ours.encode(text), text


def test_long_runs_differ_only_where_meta_splits_them(bpe: Exported) -> None:
    text = "ab" * MAX_RUN + " " * (MAX_RUN + 1) + "b"
    assert len(list(split_text(text))) > 1
    split_ids = [token for piece in split_text(text) for token in library_ids(bpe.library, piece)]
    assert split_ids == bpe.ours.encode(text)


def test_auto_tokenizer_loads_the_export(exported: Exported) -> None:
    """Next to a `config.json`, for which some releases choose another tokenizer class."""
    from transformers import AutoTokenizer

    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (exported.folder / "config.json").write_text(json.dumps(config))
    loaded, ours = AutoTokenizer.from_pretrained(exported.folder), exported.ours
    assert (loaded.bos_token_id, loaded.eos_token_id) == (ours.bos_id, ours.eos_id)
    # The padding token is not the end of text, which a padding mask would hide.
    assert ours.eos_id < loaded.pad_token_id < ours.vocab_size
    assert (len(loaded), loaded.model_max_length) == (ours.vocab_size, 8192)
    assert loaded.clean_up_tokenization_spaces is False  # has an effect in old releases only
    for text in [*CORPUS[:10], "no clean-up : it 's , isn 't it ?"]:
        ids = ours.encode(text)
        assert loaded(text).input_ids == [ours.bos_id, *ids]
        assert loaded(text, add_special_tokens=False).input_ids == ids
        assert loaded.decode([ours.bos_id, *ids, ours.eos_id], skip_special_tokens=True) == text
    names = "".join(ours.specials)
    assert loaded(names, add_special_tokens=False).input_ids == list(ours.specials.values())
    as_text = loaded(names, add_special_tokens=False, split_special_tokens=True)
    assert as_text.input_ids == ours.encode(names)


def test_exported_tokenizer_is_read_back_unchanged(exported: Exported, tmp_path: Path) -> None:
    ours = exported.ours
    again = find_tokenizer(exported.folder)
    assert again is not None
    assert (again.name, again.hash) == (ours.name, ours.hash)
    (tmp_path / "tokenizer.model").write_bytes(model_file(ours.ranks))
    (tmp_path / "tokenizer.json").write_text("not read")
    from_ranks = find_tokenizer(tmp_path)
    assert from_ranks is not None
    assert (from_ranks.name, from_ranks.hash) == (ours.name, ours.hash)


def test_stale_tokenizer_model_in_a_hugging_face_folder_is_not_read(
    bpe: Exported, tmp_path: Path
) -> None:
    folder = shutil.copytree(bpe.folder, tmp_path / "hf")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(model_file(BYTE_RANKS))  # of another model
    found = find_tokenizer(folder)
    assert found is not None and found.hash == bpe.ours.hash


def test_folder_without_tokenizer_returns_none(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    assert find_tokenizer(tmp_path / "missing") is None


def test_stop_token_ids_equal_metas() -> None:
    byte, llama3 = made("byte"), made("llama3")
    assert stop_token_ids(byte) == [byte.eos_id]
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    meta = MetaTokenizer.get_instance()
    assert stop_token_ids(llama3) == sorted(meta.stop_tokens)


def test_files_of_older_releases_are_readable(tmp_path: Path) -> None:
    """String merges, all splits of each token, other names of Llama 3's reserved tokens."""
    ranks = BYTE_RANKS | {b"aa": 256, b"aaa": 257, b"aaaa": 258}
    llama3 = Tokenizer("llama3", ranks)
    write_hugging_face(llama3, tmp_path, 8192)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["model"]["merges"] == [["a", "a"], ["aa", "a"], ["aa", "aa"]]
    values["model"]["merges"] = ["a a", "a aa", "aa a", "a aaa", "aa aa", "aaa a"]
    for token in values["added_tokens"][2:8]:
        token["content"] = f"<|of another release {token['id']}|>"
    path.write_text(json.dumps(values), encoding="utf-8")
    assert read_tokenizer_file(path).hash == llama3.hash


def rename(values: Any, old: str, new: str) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)


def swap_first_merges(values: Any) -> None:
    merges = values["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


Edit = Callable[[Any], object]
INVALID: dict[str, tuple[Edit, str]] = {
    "another model": (
        lambda v: v["model"].update(type="WordPiece"),
        r'model\.type="WordPiece".* \'BPE\'',
    ),
    "no model": (lambda v: v.pop("model"), "model=.*Field required"),
    "no specials": (lambda v: v.pop("added_tokens"), "added_tokens=.*Field required"),
    "a normalizer": (lambda v: v.update(normalizer={"type": "NFC"}), "normalizer=.*NFC"),
    "dropout": (lambda v: v["model"].update(dropout=0.1), r"model\.dropout=0\.1"),
    "byte fallback": (lambda v: v["model"].update(byte_fallback=True), "byte_fallback"),
    "another pattern": (
        lambda v: v["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
        "pre_tokenizer=.* is not Llama 3's pattern",
    ),
    "prefix space": (
        lambda v: v["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "pre_tokenizer=.* is not Llama 3's pattern",
    ),
    "not an id": (lambda v: v["model"]["vocab"].update(a="1"), r'model\.vocab\.a="1"'),
    "a gap": (lambda v: v["model"]["vocab"].update(a=9999), "are not consecutive from 0"),
    "no byte": (lambda v: rename(v, "z", "zzzz"), "byte 122 is not a token"),
    "not bytes": (
        lambda v: rename(v, "z", "日"),
        'token "日" contains "日", which is not in the byte-level alphabet',
    ),
    "merges in disorder": (swap_first_merges, "precedes .* which has a lower id"),
    "a merge less": (lambda v: v["model"]["merges"].pop(5), "1 required merges are missing"),
    "a strange merge": (
        lambda v: v["model"]["merges"].append(["日", "a"]),
        'merge .*"日", "a".* does not join two tokens',
    ),
    "a special less": (
        lambda v: v["added_tokens"].pop(),
        "15 special tokens found; expected 256 or 16",
    ),
    "special id gap": (lambda v: v["added_tokens"][3].update(id=5000), "16 special tokens"),
    "another special": (
        lambda v: v["added_tokens"][0].update(content="<s>"),
        r'token 1184 is "<s>", not <\|begin_of_text\|>',
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_unsupported_tokenizer_is_rejected(bpe: Exported, tmp_path: Path, case: str) -> None:
    edit, message = INVALID[case]
    values = json.loads((bpe.folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit(values)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(FormatError, match=message) as caught:
        find_tokenizer(tmp_path)
    assert str(path) in str(caught.value) and "use the model's" in str(caught.value)


def test_unreachable_tokens_are_rejected_without_ignore_merges(tmp_path: Path) -> None:
    unreached = Tokenizer("bpe", BYTE_RANKS | {b"abc": 256})
    write_hugging_face(unreached, tmp_path, 8192)
    path = tmp_path / "tokenizer.json"
    assert read_tokenizer_file(path).encode("abc") == [256]
    path.write_text(path.read_text().replace('"ignore_merges": true', '"ignore_merges": false'))
    assert library_ids(LibraryTokenizer.from_file(str(path)), "abc") != [256]
    with pytest.raises(FormatError, match="with ignore_merges=false, 1 tokens are not reachable"):
        read_tokenizer_file(path)


def test_damaged_files_are_rejected(bpe: Exported, tmp_path: Path) -> None:
    path, content = tmp_path / "tokenizer.json", (bpe.folder / "tokenizer.json").read_bytes()
    contents = (
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        content[:-3],
        content[: len(content) // 2],
    )
    for damaged in contents:
        path.write_bytes(damaged)
        with pytest.raises(
            FormatError, match=r"tokenizer\.json cannot be read .*; download or copy"
        ):
            read_tokenizer_file(path)
    path.unlink()
    with pytest.raises(FormatError, match="does not exist"):
        read_tokenizer_file(path)
    model = tmp_path / "tokenizer.model"
    for damaged in (b"", b"\n\x0e\n\x05<unk>", model_file(bpe.ours.ranks)[:-9]):
        model.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"tokenizer\.model is"):
            find_tokenizer(tmp_path)


def test_tokenizer_with_other_tokens_than_that_of_the_weights_is_rejected(
    bpe: Exported, tmp_path: Path
) -> None:
    byte = tmp_path / "tokenizer.model"
    byte.write_bytes(model_file(BYTE_RANKS))
    with pytest.raises(FormatError, match="has other tokens than the tokenizer in") as caught:
        resolve_tokenizer(bpe.folder, str(byte))
    assert str(caught.value).endswith("omit tokenizer_path")
    assert resolve_tokenizer(bpe.folder) is not None
    same = resolve_tokenizer(bpe.folder, str(bpe.folder))
    assert same is not None and same.ranks == bpe.ours.ranks
    # Weights whose own tokenizer cannot be read need another one.
    damaged = tmp_path / "weights"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text("{")
    assert resolve_tokenizer(damaged, str(byte)) is not None
