"""The report of a run written again, or a page that lays several runs side by side:

python -m lightning_internvl.report RUN [RUN ...] [--to FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_internvl.messages import told_by
from lightning_internvl.report.compare import check_run, write_comparison
from lightning_internvl.report.write import REPORT, write_report

COMPARISON = Path("comparison.html")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and print where it is; faults of the input end in a message."""
    parser = argparse.ArgumentParser(prog="python -m lightning_internvl.report", description="Reports of runs.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run; of several one page is made")
    parser.add_argument("--to", type=Path, help=f"the file to write; by default RUN/{REPORT}, and of several {COMPARISON}")
    options = parser.parse_args(arguments)
    with told_by(parser):
        if len(options.runs) == 1:
            check_run(options.runs[0])
            page = write_report(options.runs[0], options.to)
        else:
            page = write_comparison(options.runs, options.to or COMPARISON)
    print(f"report       {page}")


if __name__ == "__main__":
    main()
