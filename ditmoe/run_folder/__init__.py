"""Whose folder it is, checkpoints read and written, the log."""
