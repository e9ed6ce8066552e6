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
    run: Annotated[Path, run_option("Folder of the sweep; what is finished in it is kept.", None)] = Path("runs/sweep"),
    engine: Annotated[
        str, typer.Option(help="loky (processes of this machine), ray, dask, or sequential (in this process).")
    ] = "loky",
    jobs: Annotated[int, typer.Option(help="Runs at a time; each gets its share of the cores.")] = 1,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray or Dask cluster; one is started here unless given.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(help="In-domain change, in %, such as -20, to compare methods at; the strongest all reach."),
    ] = None,
    figure: Annotated[str, typer.Option(help="Figure that is compared, a column of sweep.csv.")] = "backward_transfer",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any key of the grid, such as seeds=[0,1]."),
    ] = None,
) -> None:
    """Run a grid of sequences, whatever of it is missing, and compare its methods over rates, seeds and orders.

    Writes sweep.csv (a row for each run) and cells.csv (a row for each domain measured), both as .parquet too,
    comparison.md and .json, and the trade-off as tradeoff.png and .svg. Keys of the grid are set as --set seeds=[0,1]
    or --set plan.train.epochs=2. Ends with exit code 1 if any run failed.
    """
    from gaintune.workflows.sweep import check_engine

    chosen = check_engine(engine, jobs, address)  # before what takes seconds to load
    quiet_libraries()
    from gaintune.errors import DataError, SweepError
    from gaintune.progress import plural
    from gaintune.workflows.sweep import (
        check_comparison,
        compare_sweep,
        curve_sentence,
        discard,
        pair_sentence,
        point_frame,
        read_grid,
        remarks,
        run_sweep,
        target_title,
        write,
    )

    check_comparison(figure, target)
    settled = read_grid(grid, set_ or ())
    found = run_sweep(
        settled,
        run,
        engine=chosen,
        jobs=jobs,
        address=address,
        progress=progress_on(err),
        prepare=quiet_libraries,
    )
    discard(run)
    written = "tables"
    if found.finished:
        try:
            confidence = settled.plan.evaluate.confidence
            comparison = compare_sweep(found, target=target, figure=figure, confidence=confidence)
        except DataError as error:
            say(f"methods are not compared: {error}")
        else:
            write(comparison, run)
            written = "tables and comparison"
            frame = point_frame(comparison.matched, comparison)
            rows = [[str(name), *map(str, row)] for name, row in zip(frame.index, frame.values.tolist(), strict=True)]
            out.print(table(target_title(comparison), ["method", *frame.columns], rows, numeric=range(1, 5)))
            for pair in comparison.pairs:
                say(pair_sentence(pair, comparison))
            for curve in comparison.curves:
                say(f"by curve, {curve_sentence(curve, comparison)}")
            for remark in remarks(comparison):
                say(remark)
    say(f"{plural(len(found.finished), 'run')} finished, {len(found.failed)} failed; {written} {run}")
    if found.failed:
        told = "\n".join(f"  {row.folder}: {row.error}" for row in found.failed)
        raise SweepError(f"{plural(len(found.failed), 'run')} failed; the same command tries them again:\n{told}")
