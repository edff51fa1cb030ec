"""Committed checkpoints: DCP for the sharded tensors, and around it a protocol of our own.

Saving (`saving`, beside the training `saver`) writes into a fresh hidden folder, hashes and syncs
on every rank, then writes `manifest.json` with the hashes, then `COMMITTED` with the manifest's
own, then renames to `step-XXXXXXXX`; removing (`retention`) takes `COMMITTED` first. So a folder of
that name is whole, or was damaged later, which the hashes tell. Restoring (`restoring`) takes the
highest step that is whole and that every rank can load, on all ranks together, on any mesh. What a
checkpoint is on the disk is in `files`.
"""
