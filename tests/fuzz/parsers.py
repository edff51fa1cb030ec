"""Valid files of each format that the programs read, and how they read them."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import xxhash
from random_weights import SMALL, RandomWeights, write_meta_by_hand
from safetensors.torch import load_file, save_file
from save_checkpoint import save

from checkpoint.files import find_checkpoint_damage
from checkpoint.position import Position
from checkpoint.restore import NoCheckpoint, restore
from cli.arguments import parse_options
from cli.composition import compose_config
from cli.config import load_train_config
from cli.last_launch import with_last_launch
from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.errors import DataError
from data.manifest import Manifest
from data.packing import PackedStream, pack
from data.preparation.identity import read_prepared
from data.preparation.pipeline import prepare
from data.shards import TokenStream
from data.sources.content import inspect_file
from data.sources.corpora import find_corpus
from data.sources.fingerprints import read_sources
from data.sources.rows import rows
from data.tokenizer import Tokenizer, ready_tokenizer, train_bpe
from data.tokenizer_files import read_tokenizer_path
from data.verification import verify_dataset
from evaluation.prompts import PromptEncoder, read_prompts
from formats.conversion import convert
from formats.detection import open_weights
from formats.errors import FormatError
from formats.instruct import end_token_ids, find_chat_template
from formats.metadata import has_chat_template, json_of, token_ids, training_settings
from planning.hardware import load_hardware
from resilience.event_log import EventLog
from resilience.goodput import compute_goodput, launch_times
from resilience.lock import Holder
from resilience.rewinds import load_rewinds, open_rewinds, unfinished_rewind, write_rewinds
from resilience.run_folder import COMMITTED, MANIFEST, RunFolder, RunFolderError
from resilience.run_identity import check_identity, establish_identity
from training.config import OptimConfig
from training.config_validation import ConfigError, plain
from training.metrics_file import read_records, truncate_records
from training.optimizer import build_optimizer
from training.run_folder_check import checkpoint_warnings

TINY = dataclasses.replace(SMALL, dim=16, n_heads=2, n_kv_heads=2, ffn_dim=32, vocab_size=272)
TEXTS = ("A document.\n", "", "Größe 😀\r\n", "line one\nline two\n", "x" * 300)


@dataclass(frozen=True)
class Parser:
    """A reader of files.

    Attributes:
        make: Writes valid files into an empty folder.
        files: Files that are damaged, with the kind of `mutations.BY_KIND`.
        read: Reads the folder as the programs do.
        errors: Errors that the programs print; the message names a file or the folder.
        seal: Makes hashes valid again, so that damage reaches the parser.
    """

    make: Callable[[Path], object]
    files: Mapping[str, str]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...] = ()
    seal: Callable[[Path], object] | None = None


# ---------------------------------------------------------------- weights


def read_weights(folder: Path) -> None:
    """Open weights as evaluation, generation and conversion do, and read all values."""
    weights = open_weights(folder)
    for tensor in weights.tensors.values():
        for slab in tensor.slabs():
            slab.sum()
    if weights.damage is not None:
        weights.damage()
    training_settings(weights)


def make_hugging_face(folder: Path) -> None:
    """Two files with an index, as transformers writes them."""
    convert(RandomWeights(TINY), None, folder, "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (written,) = {*index["weight_map"].values()}
    tensors = load_file(folder / written)
    (folder / written).unlink()
    names = list(tensors)
    for number, part in enumerate((names[:3], names[3:])):
        save_file({name: tensors[name] for name in part}, folder / f"{number}.safetensors")
        index["weight_map"] |= dict.fromkeys(part, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_single(folder: Path) -> None:
    convert(RandomWeights(TINY), byte_tokenizer(), folder, "hf")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ messages[0]['content'] }}", "eos_token": "<|x|>"})
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 256]}')


def make_bin(folder: Path) -> None:
    convert(RandomWeights(TINY), None, folder, "hf")
    (file,) = folder.glob("*.safetensors")
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    (folder / "model.safetensors.index.json").unlink()


def make_meta(folder: Path) -> None:
    write_meta_by_hand(RandomWeights(SMALL), folder / "meta", 1)


def read_files_of_model(folder: Path) -> None:
    """Read weights, and what generation and conversion take from the files next to them."""
    read_weights(folder)
    tokenizer = byte_tokenizer()
    find_chat_template([folder], tokenizer)
    end_token_ids(folder, tokenizer)
    files = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    has_chat_template(files)
    for name in files:
        json_of(files, name)
    token_ids(open_weights(folder), tokenizer, files)


def byte_tokenizer() -> Tokenizer:
    tokenizer = ready_tokenizer(TokenizerConfig("byte", 272))
    assert tokenizer is not None
    return tokenizer


def make_tokenizer(folder: Path) -> None:
    tokenizer = train_bpe(["the cat and the other cat " * 50], 280)
    from formats.tokenizers import write_hugging_face

    write_hugging_face(tokenizer, folder, 64)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


def read_tokenizers(folder: Path) -> None:
    for name in ("tokenizer.model", "tokenizer.json"):
        tokenizer = read_tokenizer_path(folder / name)
        assert tokenizer.decode(tokenizer.encode("the cat 😀")) == "the cat 😀"


# ---------------------------------------------------------------- datasets


def dataset(folder: Path) -> tuple[DataConfig, TokenizerConfig]:
    source = SourceConfig("text", str(folder / "texts"))
    config = DataConfig("fuzz", str(folder / "shards"), {"source": source}, workers=1)
    return dataclasses.replace(config, validation_fraction=0.2), TokenizerConfig("byte", 272)


def make_dataset(folder: Path) -> None:
    (folder / "texts").mkdir()
    for index in range(12):
        (folder / f"texts/{index}.txt").write_text(f"Document {index}. " * 9)
    prepare(*dataset(folder), progress=False)
    pack(folder / "shards", 16, progress=False)


def seal_dataset(folder: Path) -> None:
    """Remove the hashes of manifest and index; those of version 0.2 have none."""
    for path in (folder / "shards/manifest.json", folder / "shards/source/pack-16/index.json"):
        with suppress(ValueError, RecursionError):
            values = json.loads(path.read_bytes())
            if isinstance(values, dict):
                values.pop("sha256", None)
                path.write_text(json.dumps(values))


def read_dataset(folder: Path) -> None:
    shards = folder / "shards"
    verify_dataset(shards)
    read_sources(shards)
    manifest = read_prepared(*dataset(folder), log=lambda _: None)
    for source in manifest.sources:
        stream = TokenStream(shards, manifest.shards("train", source))
        for index in range(min(stream.n_windows(16), 20)):
            stream.window(index, 16)
        packed = PackedStream(shards, manifest, source)
        for index in range(min(packed.n_windows(16), 20)):
            packed.window(index, 16)


def make_preparation(folder: Path) -> None:
    """Interrupt a preparation before it writes the manifest."""
    with (
        patch.object(Manifest, "write", side_effect=KeyboardInterrupt),
        suppress(KeyboardInterrupt),
    ):
        make_dataset(folder)


def resume_preparation(folder: Path) -> None:
    prepare(*dataset(folder), progress=False)


def make_texts(folder: Path) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet

    lines = "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(TEXTS))
    table = pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))})
    files: dict[str, Callable[[Path], object]] = {
        "a.jsonl": lambda path: path.write_text(lines),
        "b.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines.encode(), mtime=0)),
        "c.txt": lambda path: path.write_text("".join(TEXTS)),
        "d.csv": lambda path: path.write_text('text,n\n"a ""b"" c",1\nd,2\n'),
        "e.json": lambda path: path.write_text(
            json.dumps([json.loads(x) for x in lines.split("\n")[:-1]])
        ),
        "f.parquet": lambda path: pyarrow.parquet.write_table(table, path),
        "g.arrow": lambda path: _write_arrow(path, table),
        "h.jsonl.zst": lambda path: path.write_bytes(_zstd(lines.encode())),
    }
    for name, write in files.items():
        (folder / name[0]).mkdir()
        write(folder / name[0] / name)


def _write_arrow(path: Path, table: Any) -> None:
    import pyarrow.ipc

    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)


def _zstd(content: bytes) -> bytes:
    import zstandard

    return zstandard.compress(content)


def read_texts(folder: Path) -> None:
    """Read each file in its format; CSV and JSON arrays are only recognized."""
    inspect_file(folder / "d/d.csv")
    inspect_file(folder / "e/e.json")
    formats = {"a": "jsonl", "b": "jsonl", "c": "text", "f": "parquet", "g": "arrow", "h": "jsonl"}
    for name, format in formats.items():
        source = SourceConfig(format, str(folder / name))  # type: ignore[arg-type]
        corpus = find_corpus("source", source)
        for part in corpus.parts:
            for _ in rows(part, source, "replace", corpus.dataset):
                pass


# ---------------------------------------------------------------- run folders


def make_logs(folder: Path) -> None:
    log = EventLog(folder / "ledger.jsonl")
    spent = {"elapsed_seconds": 1.0, "productive_seconds": 0.5, "stalled_seconds": 0.1}
    for attempt in range(2):
        log.append("start", step=2 * attempt, began="2026-01-01T00:00:00+00:00", last_step=2)
        log.append("first_step", step=2 * attempt + 1, **spent)
        log.append("save", step=2, path="step-00000002", seconds=1.0)
        log.append("rewind", number=1, skip=[1, 3])
        log.append("rewound", step=1, to=1, **{key: 2 * value for key, value in spent.items()})
        log.append("stop", reason="finished", **{key: 3 * value for key, value in spent.items()})
    records = ({"step": n, "tokens": 64 * n, "loss": 1 / n, "val_loss": 2.0} for n in range(1, 6))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))


def read_logs(folder: Path) -> None:
    run = RunFolder(folder)
    compute_goodput(EventLog(run.event_log).read(), alive_until=datetime.now(UTC))
    launch_times(run.event_log, run.metrics, None)
    list(checkpoint_warnings(run))
    read_records(run.metrics)
    truncate_records(run.metrics, 3)


def commit(folder: Path) -> None:
    """Write a valid hash of the manifest of a checkpoint, and of the files that it lists."""
    path = folder / MANIFEST
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        manifest = json.loads(path.read_bytes())
        files = {}
        for name in manifest["files"]:
            content = (folder / name).read_bytes()
            files[name] = {"bytes": len(content), "hash": xxhash.xxh3_128_hexdigest(content)}
        if files != manifest["files"]:
            path.write_text(json.dumps({**manifest, "files": files}))
    (folder / COMMITTED).write_text(hashlib.sha256(path.read_bytes()).hexdigest())


def make_run(folder: Path) -> None:
    run = RunFolder(folder)
    composed = compose_config("train", ["experiment=smoke", f"run.dir={folder}"])
    config = plain(load_train_config(composed))
    model = torch.nn.Linear(2, 2)
    checkpoint = save(
        run,
        model,
        build_optimizer(model, OptimConfig(lr=0.1)),
        Position(3, 24, 192, "hash"),
        config,
    )
    run.write_config(config)
    establish_identity(run, adopt=False)
    write_rewinds(run, [(4, 6), (1, 3)])
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["position"] |= {"rewinds": [[4, 6]], "skips": [[4, 6]], "stream_shards": {"0": [1, 2]}}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    commit(checkpoint)
    (folder / "lock").write_text(json.dumps(dataclasses.asdict(Holder.this_process())))


def seal_rewinds(folder: Path) -> None:
    path = folder / "rewinds.json"
    with suppress(ValueError, RecursionError, TypeError, AttributeError):
        values = json.loads(path.read_bytes())
        values.pop("sha256", None)
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
        path.write_text(json.dumps(values | {"sha256": digest}) + "\n")
    commit(folder / "checkpoints/step-00000003")


_composed: dict[Path, Any] = {}


def read_run(folder: Path) -> None:
    """Read a run folder as a launch does before it starts processes."""
    run = RunFolder(folder)
    if (holder := Holder.read(folder / "lock")) is not None:
        str(holder)
        holder.was_requeued_as(holder)
    check_identity(run, adopt=False)
    establish_identity(run, adopt=True)
    run.newest_position()
    run.resume_source(str(folder / "other"))
    list(checkpoint_warnings(run))
    words = ["experiment=smoke", f"run.dir={folder}"]
    if folder not in _composed:
        _composed[folder] = compose_config("train", words)
    # Validation names the keys.
    with redirect_stdout(None), suppress(ConfigError):
        load_train_config(with_last_launch(_composed[folder], parse_options(words, "train")))
    unfinished_rewind(run, load_rewinds(run))
    open_rewinds(run, rebuild=False)


def make_native(folder: Path) -> None:
    convert(RandomWeights(TINY), byte_tokenizer(), folder, "native")


def read_native(folder: Path) -> None:
    find_checkpoint_damage(folder)
    read_weights(folder)


def make_training(folder: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    save(RunFolder(folder), model, optimizer, Position(3, 24, 192, "hash"), {})


def restore_training(folder: Path) -> None:
    """Resume a run of one process."""
    damaged = folder / "checkpoints"
    try:
        model = torch.nn.Linear(2, 2)
        optimizer = build_optimizer(model, OptimConfig(lr=0.1))
        restore(RunFolder(folder), "auto", model, optimizer, report=lambda _: None)
    finally:
        for path in damaged.glob("*.damaged-*"):
            path.rename(damaged / "step-00000003")


# ---------------------------------------------------------------- files of the command line


def make_hardware(folder: Path) -> None:
    source = Path(__file__).parents[2] / "conf/hardware/h100.yaml"
    shutil.copy(source, folder / "mine.yaml")


def make_prompts(folder: Path) -> None:
    lines = (
        {"prompt": "The cat", "id": 1},
        {"prompt": [256, 84, 104], "id": "two"},
        {"messages": [{"role": "user", "content": "Hi"}]},
    )
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def read_prompt_file(folder: Path) -> None:
    encoder = PromptEncoder(TINY, byte_tokenizer(), [folder])
    _, errors = read_prompts(None, str(folder / "prompts.jsonl"), encoder)
    assert all("prompts.jsonl" in each for each in errors)


CHECKPOINT = "checkpoints/step-00000003"
PARSERS = {
    "safetensors": Parser(
        make_hugging_face,
        {
            "0.safetensors": "safetensors",
            "model.safetensors.index.json": "json",
        },
        read_weights,
        (FormatError,),
    ),
    "config": Parser(
        make_single,
        dict.fromkeys(("config.json", "tokenizer_config.json", "generation_config.json"), "json"),
        read_files_of_model,
        (FormatError,),
    ),
    "meta": Parser(
        make_meta,
        {"meta/params.json": "json", "meta/consolidated.00.pth": "zip"},
        lambda folder: read_weights(folder / "meta"),
        (FormatError,),
    ),
    "bin": Parser(make_bin, {"pytorch_model.bin": "zip"}, read_weights, (FormatError,)),
    "tokenizer": Parser(
        make_tokenizer,
        {"tokenizer.model": "bytes", "tokenizer.json": "json"},
        read_tokenizers,
        (DataError,),
    ),
    "dataset": Parser(
        make_dataset,
        {
            "shards/manifest.json": "json",
            "shards/source/pack-16/index.json": "json",
            "shards/sources.json": "json",
        },
        read_dataset,
        (DataError,),
        seal_dataset,
    ),
    "preparation": Parser(
        make_preparation,
        {"shards/preparing.json": "json", "shards/source/part-00000.json": "json"},
        resume_preparation,
        (DataError,),
    ),
    "texts": Parser(
        make_texts,
        {
            "a/a.jsonl": "lines",
            "b/b.jsonl.gz": "bytes",
            "c/c.txt": "bytes",
            "d/d.csv": "bytes",
            "e/e.json": "json",
            "f/f.parquet": "bytes",
            "g/g.arrow": "bytes",
            "h/h.jsonl.zst": "bytes",
        },
        read_texts,
        (DataError,),
    ),
    "logs": Parser(make_logs, {"ledger.jsonl": "lines", "metrics.jsonl": "lines"}, read_logs),
    "run": Parser(
        make_run,
        {
            "config.yaml": "yaml",
            "run.json": "json",
            "rewinds.json": "json",
            "lock": "json",
            f"{CHECKPOINT}/{MANIFEST}": "json",
        },
        read_run,
        (RunFolderError,),
        seal_rewinds,
    ),
    "native": Parser(
        make_native,
        {MANIFEST: "json", ".metadata": "bytes", "__0_0.distcp": "zip"},
        read_native,
        (FormatError,),
        commit,
    ),
    "resume": Parser(
        make_training,
        {
            f"{CHECKPOINT}/{MANIFEST}": "json",
            f"{CHECKPOINT}/.metadata": "bytes",
            f"{CHECKPOINT}/__0_0.distcp": "bytes",
        },
        restore_training,
        (NoCheckpoint,),
        lambda folder: commit(folder / CHECKPOINT),
    ),
    "hardware": Parser(
        make_hardware,
        {"mine.yaml": "yaml"},
        lambda folder: load_hardware(str(folder / "mine.yaml")),
        (ValueError,),
    ),
    "prompts": Parser(make_prompts, {"prompts.jsonl": "lines"}, read_prompt_file),
}
