"""Training on packed windows: pack indexes, independence of the mesh, and damaged indexes."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from conftest import read_metrics

Run = Callable[..., subprocess.CompletedProcess[str]]
PACKED = (
    *("data.packing=best_fit", "data.stages=[{from_sample:96,seq_len:128}]", "train.max_steps=24"),
    *("validation.interval=null", "validation.sample_tokens=0", "checkpoint.interval=null"),
)


def test_two_processes_pack_every_stage_and_train_on_same_samples_as_one(
    smoke_run: Run, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    overrides = (*PACKED, f"data.folder={shards}")
    two = smoke_run(tmp_path / "two", *overrides, "parallel.dp_shard=2", "data.loader_threads=2")
    assert two.stderr.count("for seq_len=64:") == 1
    assert two.stderr.count("for seq_len=128:") == 1
    one = smoke_run(tmp_path / "one", *overrides)
    assert "Packed " not in one.stderr
    found, expected = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [line["tokens"] for line in expected][-1] == 12 * 8 * 64 + 12 * 8 * 128
    hashes = [line["batch_hash"] for line in expected]
    assert [line["batch_hash"] for line in found] == hashes and len(set(hashes)) == 24


def test_damaged_pack_index_stops_run_with_remedy(smoke_run: Run, tmp_path: Path) -> None:
    overrides = (*PACKED, f"data.folder={tmp_path / 'shards'}")
    smoke_run(tmp_path / "undamaged", *overrides)
    for path in (tmp_path / "shards").glob("*/pack-128/*.pieces"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    damaged = smoke_run(tmp_path / "run", *overrides, "checkpoint.interval=5", succeeds=False)
    assert damaged.returncode == 65
    assert "Traceback" not in damaged.stderr
    assert "Newest checkpoint: step 10. Resume with: " in damaged.stderr
    (index,) = (tmp_path / "shards").glob("*/pack-128")
    assert f"delete {index}, then run `python prepare.py … pack=128`" in damaged.stderr
    shutil.rmtree(index)
    smoke_run(tmp_path / "run", *overrides, "checkpoint.interval=5")
    hashes = [line["batch_hash"] for line in read_metrics(tmp_path / "undamaged")]
    assert [line["batch_hash"] for line in read_metrics(tmp_path / "run")] == hashes
