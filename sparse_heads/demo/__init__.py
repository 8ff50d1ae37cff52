"""The `sparse-heads demo` command: a real model and real text, from head scores to a faster model."""

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
