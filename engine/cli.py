"""The command `gnomon` (= `python -m engine`)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

server = typer.Typer(no_args_is_help=True, help="Serve parts of a run over HTTP.")
app.add_typer(server, name="serve")

USER_ERROR, FAILURE, INTERRUPTED = 2, 1, 130
SHOWN_DIFFERENCES = 10


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
def plan(
    config: Annotated[Path, typer.Argument(help="YAML configuration.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    accelerator: Annotated[
        str | None, typer.Option(metavar="NAME", help="A100-80G, H100, H200, B200, L40S or cpu; H100 for cuda.")
    ] = None,
    per_node: Annotated[int, typer.Option(min=1, help="Accelerators of one node.")] = 8,
    price: Annotated[float | None, typer.Option(min=0, help="Of an accelerator-hour.")] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean length of an answer; by default the longest allowed.")
    ] = None,
    rows: Annotated[bool, typer.Option(help="Read and check the data rows.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what would run where, with how much memory, how long, at what cost, and all that is wrong; starts nothing."""
    import json

    from rich.console import Console

    from engine import preflight, preflight_report

    options = preflight.Options(accelerator, per_node, price, response_tokens, rows)
    with preflight.quiet():
        found = preflight.examine(config, overrides or [], options)
    if as_json:
        print(json.dumps(preflight_report.as_record(found)))
    else:
        preflight_report.show(found, Console())
    if found.problems:
        raise typer.Exit(USER_ERROR)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, whether it runs or not.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show how far a run is, what it is doing, what went wrong and what it can go on from."""
    import json
    from dataclasses import asdict

    from engine.tracking.status import status_of

    found = status_of(folder)
    print(json.dumps(asdict(found)) if as_json else "\n".join(found.lines()))


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    name: Annotated[
        str | None, typer.Option(help="Of the new run; by default with -replay behind the old name.")
    ] = None,
) -> None:
    """Run a finished run again and compare decisions and metrics, bit for bit."""
    from engine.replay import replay as run_again

    found = run_again(folder, name)
    if found.differences:
        shown = "\n".join(found.differences[:SHOWN_DIFFERENCES])
        print(f"{len(found.differences)} differences from {found.folder}:\n{shown}", file=sys.stderr)
        raise typer.Exit(FAILURE)
    print(f"{found.steps} steps, {found.decisions} decisions: all as before, bit for bit ({found.folder})")


@app.command()
def timeline(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, whether it runs or not.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="By default FOLDER/timeline.json.")] = None,
) -> None:
    """Write who worked when as a trace for ui.perfetto.dev or chrome://tracing, and show each actor's share."""
    from engine.tracking.timeline import busy, read_spans, write_trace

    spans = read_spans(folder)
    file = output or folder / "timeline.json"
    write_trace(spans, file)
    actors, idle = busy(spans)
    for held in actors:
        print(f"{held.actor:24} {held.seconds:10.1f} s {100 * held.share:6.1f} % of the steps' time")
    print(f"{'nobody':24} {'':12} {100 * idle:6.1f} %: the controller's own")
    print(f"trace: {file}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Folder of an `rl` run.")]) -> None:
    """Show how a run's rewards moved with the KL, which of them were over-optimised, and the alarms it had."""
    from rich.console import Console

    from engine.tracking.report import reward_report

    table, sentences = reward_report(folder)
    Console().print(table)
    print("\n".join(sentences) or "no reward fell while the total rose, and no alarm")


@app.command()
def simulate(
    config: Annotated[Path, typer.Argument(help="YAML configuration of an `rl` run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    accelerators: Annotated[str | None, typer.Option(help="Numbers of them; by default the configuration's.")] = None,
    trainers: Annotated[str | None, typer.Option(help="Shares of them that train, as in 0.25,0.5.")] = None,
    max_staleness: Annotated[str, typer.Option(help="Versions that generation may run ahead.")] = "0,1,2,4",
    lengths: Annotated[
        str | None, typer.Option(help="Of responses: lognormal:MEAN:SIGMA, fixed:TOKENS or the folder of a run.")
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Length of each prompt; by default the run's mean, or the longest allowed."),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="Whose costs are estimated where none are given, as in `gnomon plan`.")
    ] = None,
    costs: Annotated[Path | None, typer.Option(help="JSON file with the costs of the phases.")] = None,
    calibrate: Annotated[
        list[Path] | None, typer.Option(help="Folder of a run to take costs from; repeatable.")
    ] = None,
    grow: Annotated[bool, typer.Option(help="Prompts per step grow with the accelerators.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each simulated run.")] = 20,
    failures: Annotated[float, typer.Option(min=0, help="Failures of one accelerator per hour.")] = 0.0,
    restart: Annotated[float | None, typer.Option(min=0, help="Seconds until what a failed one ran is up.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one accelerator for an hour.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Simulate an `rl` run on other numbers of accelerators, synchronous and not: step time, idle time, staleness."""
    from rich.console import Console

    from engine.simulation.command import Options, run_simulation
    from engine.simulation.sweep import table_of

    options = Options(
        accelerators=accelerators,
        trainers=trainers,
        max_staleness=max_staleness,
        lengths=lengths,
        prompt_tokens=prompt_tokens,
        costs=costs,
        calibrate=calibrate or [],
        grow=grow,
        accelerator=accelerator,
        steps=steps,
        failures=failures,
        restart_s=restart,
    )
    found = run_simulation(config, overrides or [], options)
    if as_json:
        print(found.to_json(price))
        return
    Console().print(table_of(found.runs, price))
    print("\n".join(found.lines()))


@app.command()
def doctor() -> None:
    """Show versions, devices and memory, what is missing and how to mend it."""
    from engine.doctor import diagnose, print_report

    report = diagnose()
    print_report(report)
    if not report.ok:
        raise typer.Exit(FAILURE)


@server.command("reward")
def serve_reward(
    functions: Annotated[list[str], typer.Argument(help="file.py:function, pkg.mod:function or a built-in ...")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8100,
    token_env: Annotated[
        str, typer.Option(help="Environment variable that holds the token; unset: one is made and shown.")
    ] = "GNOMON_REWARD_TOKEN",
    workers: Annotated[int, typer.Option(min=1, help="Processes that run the functions.")] = 2,
    timeout: Annotated[float, typer.Option(help="Seconds of one call, where @reward names none.")] = 30.0,
    max_batch: Annotated[int, typer.Option(min=1, help="Samples in one call of the functions.")] = 64,
    max_wait_ms: Annotated[float, typer.Option(min=0, help="Milliseconds that a sample waits for others.")] = 10.0,
) -> None:
    """Serve reward functions, for runs elsewhere."""
    from engine import cluster
    from engine.rewards.server import serve

    serve(
        cluster.reward_pool,
        functions,
        host=host,
        port=port,
        token_variable=token_env,
        workers=workers,
        timeout=timeout,
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
    )


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
