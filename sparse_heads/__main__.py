"""`python -m sparse_heads`."""

from .cli import main

main()
