"""The command `gnomon` (= `python -m engine`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


@app.callback()
def _about() -> None:
    """Gnomon: distributed RLHF, from one YAML file."""


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="STAGE", help="Run this stage of a pipeline and the later ones anew."),
    ] = None,
) -> None:
    """Run a configuration, or a pipeline of several stages."""
    from engine.config_file import load_config

    loaded = load_config(config, overrides or [])

    from engine import pipeline

    result = pipeline.run(loaded, start_from=start_from)
    print(result.summary())


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of an `rl` run.")]) -> None:
    """Show how a run's rewards moved with the KL, and which of them were over-optimised."""
    from rich.console import Console

    from engine.tracking.report import reward_report

    table, sentences = reward_report(folder)
    Console().print(table)
    print("\n".join(sentences) or "no reward fell while the total rose")


@app.command()
def doctor() -> None:
    """Show versions, devices and memory, what is missing and how to mend it."""
    from engine.doctor import diagnose, print_report

    report = diagnose()
    print_report(report)
    if not report.ok:
        raise typer.Exit(FAILURE)


def main() -> None:
    """Entry point: one clear message and an exit code for every way a command can end.

    0 done; 1 a failure; 2 something to mend in the input; 130 interrupted.
    """
    from engine.config import UserError

    try:
        app()  # always ends in SystemExit or one of the errors below; a KeyboardInterrupt has become exit code 130
    except SystemExit as end:
        if end.code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        raise
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except ImportError as error:
        print(f"failed: {error}; `gnomon doctor` shows what is missing and how to mend it", file=sys.stderr)
        sys.exit(FAILURE)
    except (RuntimeError, OSError) as error:
        print(f"failed: {error} (the run's events.jsonl has the details)", file=sys.stderr)
        sys.exit(FAILURE)
