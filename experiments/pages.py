"""Pages whose numbers are what committed cells come to: docs/results.md and README.md.

    python -m experiments.pages                                        # every block of both anew
    python -m experiments.pages --page mine.md --results_dir my_results

A page holds blocks between two comments, and this program writes what is between them:

    <!-- table comparison short Fashion-MNIST -->
    <!-- end -->

The other kinds are <!-- summary EXPERIMENT BUDGET SCORE, SCORE -->, all data sets in one table, and
<!-- claim NAME -->, of experiments/claims.py. tests/test_results.py holds pages and cells together.
"""

import re
from pathlib import Path

from experiments import RESULTS, ROOT, claims, read_experiment, tables
from running.files import write_whole
from utils import ArgumentParser, UserError, command_line

PAGES = [ROOT.parent / "docs" / "results.md", ROOT.parent / "README.md"]
BLOCK = re.compile(r"(<!-- (?!end)([^\n]+?) -->\n).*?(<!-- end -->)", re.S)


def get_args_parser():
    parser = ArgumentParser("python -m experiments.pages", "Write what is in the blocks of pages anew.")
    add = parser.add_argument
    add("--page", nargs="+", default=PAGES, help="which pages (default: docs/results.md and README.md)")
    add("--results_dir", default=str(RESULTS), help="default: experiments/results")
    return parser


@command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    for page in map(Path, args.page):
        text = page.read_text("utf-8")
        write_whole(page, refreshed(text, args.results_dir))
        print(f"{page.name}: {len(BLOCK.findall(text))} blocks")


def refreshed(text, results=RESULTS):
    """A page with all its blocks made anew. Raises UserError for a block that means nothing."""
    return BLOCK.sub(lambda found: f"{found[1]}{block(found[2], results)}\n{found[3]}", text)


def block(words, results):
    kind, *rest = words.split()
    if kind == "table" and len(rest) >= 2:
        name, budget, *column = rest
        experiment = read_experiment(ROOT / f"{name}.toml", budget, results=results)
        columns = [c for c in experiment.columns() if not column or c["name"] == " ".join(column)]
        if columns:
            return "\n\n".join(tables.table(experiment, column) for column in columns)
    if kind == "summary" and len(rest) >= 3:
        experiment = read_experiment(ROOT / f"{rest[0]}.toml", rest[1], results=results)
        return tables.summary(experiment, " ".join(rest[2:]).split(", "))
    if kind == "claim" and len(rest) == 1 and rest[0] in claims.CLAIMS:
        return claims.CLAIMS[rest[0]](results)
    raise UserError(f"<!-- {words} -->: expected table EXPERIMENT BUDGET [COLUMN], or summary EXPERIMENT BUDGET SCORE, "
                    f"SCORE, or claim and one of {', '.join(claims.CLAIMS)}")  # fmt: skip


if __name__ == "__main__":
    main()
