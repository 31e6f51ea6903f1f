"""Exceptions of the package's own; everything else is a plain ValueError or TypeError."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, of another version, or not what its config.json says."""
