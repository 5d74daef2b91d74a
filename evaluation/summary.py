"""What several evaluations of the same models found, in one table: their results_*.json in one folder.

    python -m evaluation.summary runs/demo

Columns: k-NN, few labels, linear, fine-tuned, clusters, segmentation, RankMe, as far as they were evaluated there.
"""

import json
from pathlib import Path

from evaluation import markdown_table
from utils import ArgumentParser, UserError, command_line


def get_args_parser():
    parser = ArgumentParser("python -m evaluation.summary", "One table of the evaluations in a folder.")
    parser.add_argument("folder", metavar="FOLDER", help="an --output_dir of evaluations")
    return parser


@command_line
def main(argv=None):
    print(summary(get_args_parser().parse_args(argv).folder))


def summary(folder):
    """Markdown: a line per model, a column per score. Raises UserError where there are no results, or damaged ones."""
    lines, columns = {}, {"checkpoint": ("features", "")}
    for path in sorted(Path(folder).glob("results_*.json"), key=lambda path: ORDER.get(path.stem, len(ORDER))):
        for row in rows_of(path):
            for title, value, form in scores_of(path.stem, row):
                lines.setdefault(row["checkpoint"], {"checkpoint": row["checkpoint"]})[title] = value
                columns[title] = (title, form)
    if not lines:
        raise UserError(f"{folder}: no results_*.json; expected the --output_dir of evaluations")
    return markdown_table(list(lines.values()), columns)


def rows_of(path):
    try:
        return json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error!r}); run that evaluation again") from None


def scores_of(name, row):
    """[(title, value, format)] of one row of an evaluation's table."""
    if name == "results_knn":
        return [(f"{row['k']}-NN %", row["top1"], ".2f")]
    if name == "results_few":
        return [(f"{row['labels_per_class']} labels per class %", f"{row['top1']:.1f} ± {row['top1_std']:.1f}", "")]
    if name == "results_linear":
        return [("linear %", row["top1"], ".2f")]
    if name == "results_finetune":
        return [("fine-tuned %", row["top1"], ".2f")]
    if name == "results_cluster" and row.get("ami") is not None:
        return [(f"{row['method']}, AMI", row["ami"], ".3f")]
    if name == "results_dense":
        return [(f"{row['method']} segmentation, mean IoU %", row["miou"], ".2f")]
    return [("RankMe", row["rankme"], ".1f")] if name == "results_collapse" else []


NAMES = ("knn", "few", "linear", "finetune", "cluster")
ORDER = {f"results_{name}": i for i, name in enumerate(NAMES)}


if __name__ == "__main__":
    main()
