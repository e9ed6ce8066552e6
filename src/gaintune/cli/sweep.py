"""The command that runs a grid and compares its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gaintune.cli.console import err, out, progress_on, quiet_libraries, say, table
from gaintune.cli.options import command, run_option

commands = typer.Typer()


@command(
    commands,
    "sweep",
    group="Training",
    examples="""\
gaintune sweep grid.yaml --run runs/sweep --jobs 2
gaintune sweep grid.yaml --set seeds=[0,1] --set plan.train.epochs=2
gaintune sweep grid.yaml --engine ray --address ray://head:10001 --jobs 8
gaintune sweep grid.yaml --figure in_domain --target -20""",
)
def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Grid: methods, rates, orders, seeds and more.")],
    run: Annotated[Path, run_option("Folder of the sweep; finished runs in it are kept.", None)] = Path("runs/sweep"),
    engine: Annotated[
        str, typer.Option(help="loky (local processes), ray, dask, or sequential (one process).")
    ] = "loky",
    jobs: Annotated[int, typer.Option(help="Runs at a time; each gets its share of the cores.")] = 1,
    address: Annotated[str | None, typer.Option(help="Ray or Dask cluster; a local one starts unless given.")] = None,
    target: Annotated[
        float | None,
        typer.Option(help="In-domain change, in %, to compare at; the strongest that all reach, unless given."),
    ] = None,
    figure: Annotated[str, typer.Option(help="Figure to compare, a column of sweep.csv.")] = "backward_transfer",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key of the grid, such as seeds=[0,1].")
    ] = None,
) -> None:
    """Run a grid of sequences, whatever of it is missing, and compare its methods over rates, seeds and orders.

    Writes sweep.csv (a row for each run) and cells.csv (a row for each domain measured), both as .parquet too,
    comparison.md and .json, and the trade-off as tradeoff.png and .svg. Keys of the grid are set as --set seeds=[0,1]
    or --set plan.train.epochs=2. Ends with exit code 1 if any run failed.
    """
    import gaintune.workflows.sweep as sweeps

    engine = sweeps.check_engine(engine, jobs, address)  # before what takes seconds to load
    quiet_libraries()
    from gaintune.errors import DataError, SweepError
    from gaintune.progress import plural

    sweeps.check_comparison(figure, target)
    checked, progress = sweeps.read_grid(grid, set_ or ()), progress_on(err)
    done = sweeps.run_sweep(
        checked, run, engine=engine, jobs=jobs, address=address, progress=progress, prepare=quiet_libraries
    )
    sweeps.discard(run)
    written = "tables"
    if done.finished:
        try:
            confidence = checked.plan.evaluate.confidence
            comparison = sweeps.compare_sweep(done, target=target, figure=figure, confidence=confidence)
        except DataError as error:
            say(f"methods are not compared: {error}")
        else:
            sweeps.write(comparison, run)
            written = "tables and comparison"
            frame = sweeps.point_frame(comparison.matched, comparison)
            rows = [[str(name), *map(str, row)] for name, row in zip(frame.index, frame.values.tolist(), strict=True)]
            heads = ["method", *frame.columns]
            out.print(table(sweeps.target_title(comparison), heads, rows, numeric=range(1, 5)))
            lines = [sweeps.pair_sentence(pair, comparison) for pair in comparison.pairs]
            lines += [f"by curve, {sweeps.curve_sentence(curve, comparison)}" for curve in comparison.curves]
            for line in (*lines, *sweeps.remarks(comparison)):
                say(line)
    say(f"{plural(len(done.finished), 'run')} finished, {len(done.failed)} failed; {written} {run}")
    if done.failed:
        failures = "\n".join(f"  {row.folder}: {row.error}" for row in done.failed)
        raise SweepError(f"{plural(len(done.failed), 'run')} failed; the same command tries them again:\n{failures}")
