"""Checkpoints: format, plan, write, commit, verify, read, restore, retention; and what the commands do with them.

On the way of a save: `saver` (at the step) -> `plan` (who writes what) -> `image` (a file in memory) -> `write` (a file
on the disk) -> `commit` (votes, manifest, rename) -> `retention`. On the way back: `restore` (which one) -> `verify`
(every byte) -> `read` (into tensors).
"""
