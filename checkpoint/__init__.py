"""Distributed checkpoints: PyTorch DCP for sharded tensors, inside a commit protocol.

- `writer`: the commit protocol. Write into a hidden folder, hashing and fsyncing on every rank;
  write `manifest.json` with all hashes, then `COMMITTED` with the hash of the manifest; rename to
  `step-XXXXXXXX`.
- `saver`: run the protocol in a background thread.
- `retention`: delete old checkpoints of the run, after renaming them to a hidden name.
- `restore`: load the newest checkpoint that is valid and that every rank can read, on any mesh.
- `files`: hashed files and the manifest.
- `position`: the state of a run other than tensors.

A folder named `step-XXXXXXXX` with `COMMITTED` is complete, or was damaged later; hashes detect it.
"""
