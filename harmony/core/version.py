"""The version of the package, for its rooms, its root and its packaging."""

__version__ = "0.1.0"
