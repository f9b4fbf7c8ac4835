"""How a save and a restore work.

Save: `saver` (at the step) -> `plan` (who writes what) -> `shard_file` (a file in `staging` memory) -> `write` (a file
on the disk) -> `commit` (votes, manifest, rename) -> `retention`. Restore: `restore` (which one) -> `verify` (every
byte) -> `read` (into tensors).
"""
