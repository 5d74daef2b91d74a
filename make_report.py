"""A page that explains a run, or several beside one another, from what they have left in their folders.

    python make_report.py runs/cplearn --output report.html
    python make_report.py runs/seed0 runs/seed1 --output seeds.html      # curves over one another, scores over seeds
    python make_report.py runs/cplearn --output report.html --watch      # written anew while the run writes
    python make_report.py runs                                           # a list of all runs below, with their state

The page is one file, which leads nowhere and asks nothing of the network. The runs are only read: training never waits.
"""

import time
from pathlib import Path

from evaluation import markdown_table
from report import duration, headline, is_run, read_run, report_page, runs_below
from report.compare import SCORES, score_of
from running.files import write_whole
from utils import ArgumentParser, UserError, command_line, positive

WAIT_S = 30.0  # the least time between two pages of --watch, and what it shows a browser


def get_args_parser():
    parser = ArgumentParser("python make_report.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "runs", nargs="+", metavar="RUN", help="an --output_dir of main_cplearn.py; or a folder of such folders: a list"
    )
    add("--output", default=None, metavar="FILE", help="the page (default: report.html in the run's folder; of several "
        "runs it must be given)")  # fmt: skip
    add("--watch", action="store_true", help="write the page anew until no run is running; a browser reloads it")
    add("--every_s", type=positive(float), default=WAIT_S, help="seconds between two pages of --watch")
    return parser


@command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    if args.output is None and len(args.runs) == 1 and Path(args.runs[0]).is_dir() and not is_run(args.runs[0]):
        print(list_of_runs(args.runs[0]))
        return
    output = output_of(args)
    while write_page(args.runs, output, args.every_s if args.watch else None):
        time.sleep(args.every_s)


def output_of(args):
    if args.output is None and len(args.runs) > 1:
        raise UserError(f"{len(args.runs)} runs: expected --output FILE, the page to write")
    return Path(args.output or Path(args.runs[0]) / "report.html")


def write_page(folders, output, every_s):
    """Write the page, and say so; returns whether to write it again."""
    runs = [read_run(folder) for folder in folders]
    again = every_s is not None and any(run.state == "running" for run in runs)
    page = report_page(runs, refresh=round(every_s) if again else None)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, page)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(f"{output}: {len(page) / 1e6:.1f} MB; {'; '.join(headline(run)[1] for run in runs)}", flush=True)
    return again


def list_of_runs(folder):
    """Markdown: a line per run below `folder`."""
    found = [read_run(path) for path in runs_below(folder)]
    if not found:
        raise UserError(f"{folder}: no runs below; expected folders that main_cplearn.py has written")
    scores = [title for title in SCORES[:3] if any(score_of(run, title) is not None for run in found)]
    columns = {name: (name, "") for name in ("run", "state", "step", "last line")}
    columns |= {title[0]: (title[0], title[-1]) for title in scores}
    rows = [
        {"run": str(run.folder), "state": run.state, "step": progress(run), "last line": age(run)}
        | {title[0]: score_of(run, title) for title in scores}
        for run in found
    ]
    return markdown_table(rows, columns)


def progress(run):
    return f"{run.step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")


def age(run):
    log = run.folder / "log.txt"
    return f"{duration(max(0.0, time.time() - log.stat().st_mtime))} ago" if log.is_file() else None


if __name__ == "__main__":
    main()
