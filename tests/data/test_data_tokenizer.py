"""Token ids match Meta's tokenizer and the training library, and decode to the same text."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import DEADLINE

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.manifest import SPLITS
from data.preparation.pipeline import prepare
from data.preparation.splitting import is_validation
from data.shards import TokenStream
from data.tokenizer import (
    Tokenizer,
    _in_thread,
    _train_library_bpe,
    load_tokenizer,
    model_file,
    read_tokenizer,
    ready_tokenizer,
    split_text,
    train_bpe,
)

TEXTS = [
    "",
    "Hello, world! It's 12345 o'clock, they'll say WE'RE late.\r\n\r\n\tIndented  twice \n ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. Съешь ещё этих булок.",
    "人人生而自由,在尊严和权利上一律平等。 すべての人間は 모든 인간은 كل الناس सभी मनुष्य",
    "def f(x):\n    return [y ** 2 for y in x if y % 0x1F != 3]  # naïve\n\n\nclass A: ...\n",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u3000\xa0\x00\x1c\x85 \U0001f9d1\u200d\U0001f680",
    "<|begin_of_text|>not special<|eot_id|><|reserved_special_token_7|>",
    " " * 1_000_000 + "x",
    "x" * 60_000 + " " * 25_001 + "y" * 25_000 + "\n" * 25_000 + "z",
    "".join(f"word{i} " for i in range(60_000)),
]


# Sentences in many scripts, emoji with joiners, and source code of this repository.
CORPUS = [
    "Tiếng Việt có dấu; Ελληνικά; עברית עם ניקוד: שָׁלוֹם; ไทยไม่เว้นวรรค; ქართული; አማርኛ",
    "पहले १२३ और ৪৫৬, फिर ١٢٣٬٤٥٦٫٧٨٩ — ①②③ Ⅳ ½ 1234567890 3.14e-10",
    "Zeile 1\nZeile 2\r\n\r\n\tEinzug   und Leerraum \u3000\xa0\u2028 Ende ",
    "🇩🇪🇯🇵 👩🏽‍💻 👨‍👨‍👧‍👦 ❤️‍🔥 ☃️ #️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 zwei 🙂🙃",
    "日本語とEnglishと한국어가 섞인 текст, 中文，标点。“引号”…",
    "SELECT * FROM t WHERE a <> 'b' -- x\n#include <stdio.h>\nint main(void){return 0;}\n",
    *(file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))),
]


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    if importlib.util.find_spec("llama_models") is None:
        pytest.skip("needs the package llama-models (extra `llama3`)")
    tokenizer = ready_tokenizer(TokenizerConfig("llama3", 128_256))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_bpe([Path(__file__).read_text()] * 2, 600)


def byte() -> Tokenizer:
    tokenizer = ready_tokenizer(TokenizerConfig("byte", 272))
    assert tokenizer is not None
    return tokenizer


def test_llama3_ids_equal_those_of_metas_tokenizer(llama3: Tokenizer) -> None:
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    meta = MetaTokenizer.get_instance()
    assert (llama3.vocab_size, llama3.bos_id, llama3.eos_id) == (
        meta.n_words,
        meta.bos_id,
        meta.eos_id,
    )
    assert llama3.specials == meta.special_tokens
    for text in TEXTS:
        document = llama3.encode_document(text)
        assert llama3.encode(text) == meta.encode(text, bos=False, eos=False)
        assert document.tolist() == meta.encode(text, bos=True, eos=True)
        assert document.dtype == np.uint32


def test_prepared_shards_contain_the_ids_of_metas_tokenizer(
    llama3: Tokenizer, tmp_path: Path
) -> None:
    """Special tokens included."""
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    meta = MetaTokenizer.get_instance()
    texts = [text for text in [*CORPUS, *TEXTS] if text and "\0" not in text]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = DataConfig(
        "corpus",
        str(tmp_path / "shards"),
        {"mixed": SourceConfig("jsonl", str(path))},
        validation_fraction=0.3,
        shard_tokens=20_000,
    )
    manifest = prepare(data, TokenizerConfig("llama3", 128_256), progress=False)
    assert manifest.n_documents("train") + manifest.n_documents("validation") == len(texts)
    for split in SPLITS:
        stream = TokenStream(Path(data.folder), manifest.shards(split))
        tokens, starts = stream.window(0, stream.n_tokens - 1)  # all tokens
        in_split = [text for text in texts if is_validation(text, 0.3) == (split == "validation")]
        expected = [meta.encode(text, bos=True, eos=True) for text in in_split]
        assert starts.tolist() == [0, *np.cumsum([len(ids) for ids in expected])[:-1].tolist()]
        assert tokens.tolist() == [token for ids in expected for token in ids]


@settings(deadline=None, max_examples=40)
@given(
    runs=st.lists(
        st.tuples(
            st.sampled_from([" ", "\n", "a", "b", "é", "\x1c", "\x85"]),
            st.sampled_from([1, 2, 12_499, 12_500, 12_501, 24_999, 25_000, 25_001, 50_001]),
        ),
        max_size=12,
    ),
)
def test_pieces_match_metas_tokenizer(llama3: Tokenizer, runs: list[tuple[str, int]]) -> None:
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    split = MetaTokenizer._split_whitespaces_or_nonwhitespaces
    text = "".join(character * count for character, count in runs)
    reference = [
        piece
        for start in range(0, len(text), 400_000)
        for piece in split(text[start : start + 400_000], 25_000)
    ]
    assert list(split_text(text)) == reference


@pytest.mark.parametrize("text", TEXTS)
def test_ids_decode_to_the_original_text(trained: Tokenizer, text: str) -> None:
    for tokenizer in (byte(), trained):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids, default=0) < len(tokenizer.ranks)  # text never encodes to special tokens
    assert byte().decode([byte().bos_id]) == "<|begin_of_text|>"


def test_byte_tokenizer_ids_equal_utf8_bytes() -> None:
    assert byte().encode("é x") == list("é x".encode())
    assert byte().vocab_size == 272


def test_bpe_ids_match_the_training_library() -> None:
    text = Path(__file__).read_text()
    ours, theirs = train_bpe([text], 600), _train_library_bpe([text], 584)
    assert ours.vocab_size == 600
    for sample in (text, *TEXTS[:7]):
        assert ours.encode(sample) == theirs.encode(sample).ids


def test_trained_tokenizer_file_depends_on_the_corpus_only(trained: Tokenizer) -> None:
    """Train in processes with different hash seeds and thread counts to detect randomness."""
    program = (
        "import sys; from pathlib import Path; from data.tokenizer import *; "
        f"text = Path({__file__!r}).read_text(); "
        "sys.stdout.buffer.write(model_file(train_bpe([text] * 2, 600).ranks))"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": seed}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        content = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=True
        ).stdout
        assert content == model_file(trained.ranks)


def test_tokenizer_file_round_trip_keeps_the_hash(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model_file(trained.ranks))
    reread = read_tokenizer(path, "bpe")
    assert reread.ranks == trained.ranks
    assert reread.hash == trained.hash
    assert load_tokenizer(TokenizerConfig("bpe", 600), tmp_path).hash == trained.hash
    assert read_tokenizer(path, "llama3").hash != trained.hash  # other special tokens
    assert byte().hash != trained.hash


def test_invalid_tokenizer_files_are_rejected(trained: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prepare the data first"):
        load_tokenizer(TokenizerConfig("bpe", 600), tmp_path)
    path = tmp_path / "tokenizer.model"
    with pytest.raises(DataError, match=r"tokenizer\.path=.* does not exist"):
        read_tokenizer(path, "bpe")
    path.write_bytes(b"not a tokenizer")
    with pytest.raises(DataError, match=r"is not a tokenizer\.model, whose lines are"):
        read_tokenizer(path, "bpe")
    lines = model_file(trained.ranks).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:300] + lines[301:]))
    with pytest.raises(DataError, match="is damaged"):
        read_tokenizer(path, "bpe")
    missing_byte = {
        token if token != b"z" else b"zzzz": trained.ranks[token] for token in trained.ranks
    }
    path.write_bytes(model_file(missing_byte))
    with pytest.raises(DataError, match="is damaged"):
        read_tokenizer(path, "bpe")
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=512 .*use 600"):
        load_tokenizer(TokenizerConfig("bpe", 512), tmp_path)
    with pytest.raises(DataError, match=r"tokenizer\.vocab_size=4096 .*use at most"):
        train_bpe(["short"], 4096)


def test_error_for_missing_llama3_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="extra `llama3`"):
        ready_tokenizer(TokenizerConfig("llama3", 128_256))


def test_interrupt_ends_library_code_that_handles_no_signals() -> None:
    program = (
        "import hashlib\n"
        "from data.tokenizer import _in_thread\n"
        "print('started', flush=True)\n"
        "_in_thread(lambda: hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1))\n"  # minutes
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in errors
    with pytest.raises(ZeroDivisionError):
        _in_thread(lambda: 1 // 0)
