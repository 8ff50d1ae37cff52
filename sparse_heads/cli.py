"""The command `sparse-heads`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from .demo import DEFAULT_MODEL
from .errors import SparseHeadsError, UnsupportedError

app = typer.Typer(
    help="Multi-head attention in which a head that is switched off costs nothing.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A folder, or a name on the Hub.")] = DEFAULT_MODEL,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Sentences, one a line; else Python's own docstrings."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where torch computes: cpu, cuda, cuda:1 ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the picture, the numbers, the scores and the subset.")] = Path(
        "sparse-heads-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the split, the projections and the random heads.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sentences and rounds: half a minute.")] = False,
) -> None:
    """Score a real model's heads, switch the weakest off, and show what that keeps and saves."""
    from rich.console import Console

    missing = [name for name in ("transformers", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"demo: needs {', '.join(missing)}: pip install 'sparse_heads[transformers,viz]'")
    from .demo.run import run_demo
    from .demo.study import FULL, QUICK

    run_demo(model, text, device, out, seed, QUICK if quick else FULL, Console())


@app.command()
def env() -> None:
    """Show which backends can run here, why the others cannot, and the versions of what they stand on."""
    from rich.console import Console
    from rich.table import Table

    from .environment import environment

    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, description in environment():
        table.add_row(name, description)
    Console().print(table, highlight=False, markup=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a source checkout; every argument, --help too, goes to benchmarks/run.py."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise SparseHeadsError(f"bench: wanted a source checkout with benchmarks/run.py, got an install in {checkout}")
    command = [sys.executable, "-m", "benchmarks.run", *context.args]
    raise typer.Exit(subprocess.run(command, cwd=checkout, check=False).returncode)


def main() -> None:
    """Entry point: errors raised on purpose are one line on standard error and exit status 1."""
    try:
        app()
    except SparseHeadsError as error:
        print(f"sparse-heads: {error}", file=sys.stderr)
        sys.exit(1)
