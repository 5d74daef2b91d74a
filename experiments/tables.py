"""The table of an experiment, from what was kept of its cells: a line per row, mean and deviation over seeds.

python -m experiments.tables experiments/comparison.toml --budget short
"""

import statistics

from evaluation import markdown_table
from experiments import RESULTS, read_experiment, score_of
from utils import ArgumentParser, command_line


def get_args_parser():
    parser = ArgumentParser("python -m experiments.tables", "Tables of an experiment, from what was kept of its cells.")
    add = parser.add_argument
    add("experiment", metavar="FILE", help="experiments/NAME.toml")
    add("--budget", default="short", help="of that experiment")
    add("--results_dir", default=str(RESULTS), help="default: experiments/results")
    return parser


@command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    experiment = read_experiment(args.experiment, args.budget, results=args.results_dir)
    print("\n\n".join(table(experiment, column) for column in experiment.columns()))


def table(experiment, column):
    """Markdown: a line per row of the experiment, mean and standard deviation over seeds of each score."""
    if not is_begun(experiment, column):
        return f"{column['name']}: not run yet. {command_of(experiment)}"
    scores = experiment.spec["score"]
    lines, titles = [], {"row": (column["name"], "")}
    for row in experiment.rows():
        found = experiment.finals(row, column)
        line = {"row": row["name"]}
        for score in scores:
            line[score["name"]] = cell_text(found, score, row, len(experiment.seeds(row)))
            of_paper = row.get("paper", {}).get(column["name"], {}).get(score["name"])
            if of_paper is not None:
                line[f"{score['name']}, paper"] = of_paper
        lines.append(line)
    for score in scores:
        for title in (score["name"], f"{score['name']}, paper"):
            if any(title in line for line in lines):
                titles[title] = (title, "")
    return f"{markdown_table(lines, titles)}\n\n{caption(experiment, [column], scores)}"


def summary(experiment, names):
    """Markdown: one table of all data sets that have a result, with the scores of these names alone."""
    scores = [score for score in experiment.spec["score"] if score["name"] in names]
    columns = [c for c in experiment.columns() if is_begun(experiment, c)]
    if not columns:
        return f"Not run yet. {command_of(experiment)}"
    titles = {"row": ("", "")} | {
        (c["name"], s["name"]): (f"{c['name']}, {s['name']}", "") for c in columns for s in scores
    }
    lines = []
    for row in experiment.rows():
        line = {"row": row["name"]}
        for column in columns:
            found = experiment.finals(row, column)
            line |= {
                (column["name"], score["name"]): cell_text(found, score, row, len(experiment.seeds(row)))
                for score in scores
            }
        lines.append(line)
    return f"{markdown_table(lines, titles)}\n\n{caption(experiment, columns, scores)}"


def is_begun(experiment, column):
    return any(experiment.finals(row, column) for row in experiment.rows())


def cell_text(found, score, row, num_seeds):
    """ "51.2 ± 0.3", with what chance gives, how many cells failed, and how many there are where some are missing."""
    if not found:
        return None
    values = [value for result in found if (value := value_of(result, score, row)) is not None]
    failed = sum(result["status"] == "failed" for result in found)
    if not values:
        return f"failed ({failed} of {len(found)})" if failed else None
    text = describe(values, score.get("format", ""))
    if "chance" in score:
        levels = [
            v for result in found if (v := score_of(result, score["chance"], row.get("take", "trained"))) is not None
        ]
        text += f" ({statistics.fmean(levels):{score['format']}})"
    if len(found) < num_seeds:
        text += f" (n = {len(found)})"
    return text + (f", {failed} failed" if failed else "")


def value_of(result, score, row):
    if "take" in row and score["from"].startswith("cpu_s"):
        return None  # a baseline costs no training
    value = score_of(result, score["from"], row.get("take", "trained"))
    return value if value is None or isinstance(value, str) else value * score.get("times", 1)


def describe(values, form):
    """Numbers: mean and sample standard deviation; words: each with its count, unless they are all the same."""
    if isinstance(values[0], str):
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        if len(counts) == 1:
            return values[0]
        return "; ".join(f"{value} ({count} of {len(values)})" for value, count in counts.items())
    text = f"{statistics.fmean(values):{form}}"
    return f"{text} ± {statistics.stdev(values):{form}}" if len(values) > 1 else text


LEVELS = {  # what a score would be by chance, and for whom
    "nmi_chance": "the same codes under permuted labels",
    "alignment_chance": "codes in random directions",
}


def caption(experiment, columns, scores):
    """What a reader must know of a table, and the command that makes it."""
    results = [result for column in columns for row in experiment.rows() for result in experiment.finals(row, column)]
    seeds = sorted({result["seed"] for result in results})
    commits = sorted({commit for result in results for commit in result["commit"].split(", ")})
    cpu = sum(sum(result["cpu_s"].values()) for result in results) / 3600
    keys = [score["chance"].split(".")[-1] for score in scores if "chance" in score]
    levels = [LEVELS.get(key, key) for key in keys]
    chance = f" In brackets: {'; '.join(levels)}." if levels else ""
    return (
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; {len(results)} cells, {cpu:.1f} CPU-hours "
        f"with their evaluations, commit {', '.join(commits)}.{chance} "
        f"{command_of(experiment)}"
    )


def command_of(experiment):
    return f"`python run_experiments.py experiments/{experiment.name}.toml --budget {experiment.budget}`"


if __name__ == "__main__":
    main()
