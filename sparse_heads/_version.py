"""The version, in one place: read by the package, by setuptools and by `sparse-heads env`."""

__version__ = "0.1.0"
