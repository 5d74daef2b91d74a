"""An experiment: a table as data, and where its results lie.

    experiment = read_experiment("experiments/comparison.toml", "short")
    for cell in experiment.plan():              # the cells that are known by now; cells of grids come first
        print(cell.name, cell.flags)

A TOML file in this folder holds

    title, about     what the table shows; what was chosen where a paper is silent or contradicts itself
    paper            the paper's tables that it is, such as ["Table 2", "Table 8"]
    [flags]          of every training command, by main_cplearn.py's names
    [budget.NAME]    seeds, and flags of that budget; `rows` and `columns`: only these; `tune = false`: no grids;
                     `evaluate = { NAME = {...} }`: flags of an evaluation over the file's
    [[column]]       name, flags: a data set; `prepare`: the words of a command that makes it, and keeps it where it is
    [[row]]          name, flags: an objective; `paper`: what the paper has, by column and score, a number or
                     "0.35 ± 0.01"; and, where it has them, `seeds`, `script` (instead of main_cplearn.py), `take` (the
                     scores of an evaluation's baseline), `tune` (a grid), `like` (the row whose choice from its grid
                     this row takes), `vary` ({flag: values}: a row for each of their combinations, whose name has
                     {flag} in it)
    [tune]           `first`: what every grid begins with; flags of its runs, their seed, `evaluate`, and the `score`
                     that chooses among them
    [evaluate.NAME]  flags of an evaluation, `script` (by default eval_NAME.py), `keep`: what else of its JSON is kept,
                     `checkpoints = "all"`: also of the epochs that --saveckp_freq keeps
    [log]            `keep`: numbers of log.txt that are kept line by line
    [[score]]        name, `from` (NAME.KEY, or NAME[METHOD].KEY of one of several lines), `format`; `chance`: where its
                     level by chance is; `times`: what it is multiplied by
    [[figure]]       name, kind, what it shows: experiments/figures.py; `rows` (patterns such as "CPLearn*") and
                     `columns`: only these

Later flags win: [flags], the budget's, the column's, the row's, the last two with `budget.NAME` of their own; then what
a grid chose. {flag} in a flag's value or in `prepare` is the value of that flag. `tune` is a list of [flag, values]:
the flags are searched one after another, each with those before it as chosen and those after it as in the row's flags;
so grids of equally long lists cost equally many runs.
"""

import itertools
import json
import re
import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from utils import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
KEYS = {  # of the file and of sections whose misspelt keys would be missed in silence
    "": {"title", "about", "paper", "flags", "budget", "column", "row", "tune", "evaluate", "log", "score", "figure"},
    "budget": {"seeds", "flags", "rows", "columns", "tune", "evaluate"},
    "column": {"name", "flags", "budget", "prepare"},
    "row": {"name", "vary", "flags", "paper", "seeds", "script", "take", "tune", "like", "budget"},
    "tune": {"first", "flags", "seed", "evaluate", "score"},
    "log": {"keep"},
    "score": {"name", "from", "format", "chance", "times"},
    "figure": {"name", "kind", "paper", "rows", "columns", "about"}
    | {"x", "scores", "keys", "file", "crop", "axes", "relative"},
}
LISTS = ("column", "row", "score", "figure")  # sections that there are several of
BASELINES = ("raw pixels", "random weights")  # names in the evaluations' tables


@dataclass
class Cell:
    """One training run and its evaluations."""

    experiment: str
    budget: str
    row: str
    column: str
    seed: int
    script: str
    flags: dict
    evaluations: dict  # {name: flags, without those about folders}
    chosen: dict = field(default_factory=dict)  # flags that a grid chose, or that this run of a grid tries
    in_grid: bool = False
    prepare: list = field(default_factory=list)  # words of a command that makes the images

    @property
    def steps(self):
        """Names of its commands, in their order."""
        return ["prepare"] * bool(self.prepare) + ["train", *self.evaluations]

    @property
    def name(self):
        """A file's name, no two alike in one experiment and budget."""
        tried = [f"{flag}={value}" for flag, value in self.chosen.items()] if self.in_grid else []
        return "grid/" * self.in_grid + ",".join(map(slug, [self.row, self.column, *tried, f"seed{self.seed}"]))


class Experiment:
    """A table at one budget."""

    def __init__(self, name, spec, budget, overrides=None, results=RESULTS, columns=None):
        self.name, self.spec, self.budget, self.overrides = name, spec, budget, overrides or {}
        self.only_columns = columns
        self.results = Path(results) / name / budget

    @property
    def at_budget(self):
        return self.spec["budget"][self.budget]

    def rows(self):
        return self.some("row")

    def columns(self):
        only = self.only_columns
        return [column for column in self.some("column") if only is None or column["name"] in only]

    def some(self, kind):
        """The rows or columns of this budget."""
        only = self.at_budget.get(f"{kind}s")
        return [part for part in self.spec[kind] if only is None or part["name"] in only]

    def seeds(self, row):
        return row.get("seeds", self.at_budget["seeds"])[: len(self.at_budget["seeds"])]

    def flags(self, row, column):
        """{flag: value} of a row's training in a column, before any grid."""
        merged = {}
        for part in (self.spec, self.at_budget, column, row):
            merged |= part.get("flags", {})
            if part is not self.spec and part is not self.at_budget:
                merged |= part.get("budget", {}).get(self.budget, {})
        return self.overridden(merged)

    def overridden(self, flags):
        """With --set over the file's; an empty value takes the flag away, and {flag} is the value of another one."""
        flags = {flag: value for flag, value in (flags | self.overrides).items() if value != ""}
        return {flag: filled(value, flags) for flag, value in flags.items()}

    def plan(self):
        """Cells that are known by now: of the grids, and of each row whose grid has ended, seed after seed."""
        in_grids, cells = {}, []
        for column in self.columns():
            for row in self.rows():
                tried, chosen = self.search(self.tuned(row), column)
                in_grids |= {cell.name: cell for cell in tried}
                if chosen is not None:
                    cells += [self.cell(row, column, seed, chosen) for seed in self.seeds(row)]
        return [*in_grids.values(), *sorted(cells, key=lambda cell: cell.seed)]  # a sort that keeps rows in order

    def every(self):
        """Cells of every kind that there may be, also of grids that have not ended: to check before anything runs."""
        for column in self.columns():
            for row in self.rows():
                grid = self.grid_of(self.tuned(row))
                first = {flag: values[0] for flag, values in grid}
                yield self.cell(row, column, self.seeds(row)[0], first)
                for flag, values in grid:
                    yield from (self.cell_of_grid(self.tuned(row), column, first | {flag: value}) for value in values)

    def without_choice(self):
        """Names of rows and columns whose grid has ended, with no run that could be chosen."""
        for column in self.columns():
            for row in self.rows():
                tried, chosen = self.search(self.tuned(row), column)
                if chosen is None and all(self.read(cell) is not None for cell in tried):
                    yield row["name"], column["name"]

    def search(self, row, column):
        """(the cells of a row's grid so far, the flags that it chose); None where it has not ended, or all failed."""
        grid = self.grid_of(row)
        flags = self.flags(row, column)
        point, cells = {flag: flags.get(flag) for flag, _ in grid}, []
        for flag, values in grid:
            tried = [self.cell_of_grid(row, column, point | {flag: value}) for value in values]
            cells += tried
            results = [self.read(cell) for cell in tried]
            if None in results:
                return cells, None
            best = best_of(tried, results, self.spec["tune"]["score"])
            if best is None:
                return cells, None
            point = best.chosen
        return cells, point

    def grid_of(self, row):
        """[(flag, values)]: one flag after another. Raises UserError for a flag that --set has fixed."""
        if not self.at_budget.get("tune", True) or "tune" not in row:
            return []
        grid = [*self.spec["tune"].get("first", []), *row["tune"]]
        if fixed := sorted({flag for flag, _ in grid} & set(self.overrides)):
            raise UserError(f"--set {fixed[0]}: row {row['name']} has a grid of it; take it out of the file's `tune`")
        return grid

    def tuned(self, row):
        """The row whose grid chooses this row's flags."""
        return next(other for other in self.spec["row"] if other["name"] == row.get("like", row["name"]))

    def cell(self, row, column, seed, chosen):
        flags = self.flags(row, column) | chosen
        of_budget = self.at_budget.get("evaluate", {})
        evaluations = {name: own | of_budget.get(name, {}) for name, own in self.spec.get("evaluate", {}).items()}
        if row.get("take") in BASELINES:
            for of_evaluation in evaluations.values():
                of_evaluation["baselines"] = True
        script = row.get("script", "main_cplearn.py")
        cell = Cell(self.name, self.budget, row["name"], column["name"], seed, script, flags, evaluations, chosen)
        cell.prepare = [filled(word, flags) for word in column.get("prepare", [])]
        return cell

    def cell_of_grid(self, row, column, point):
        tune = self.spec["tune"]
        cell = self.cell(row, column, tune.get("seed", 0), point)
        cell.flags = self.overridden(cell.flags | tune.get("flags", {}))
        cell.evaluations = {name: cell.evaluations[name] for name in tune["evaluate"]}
        cell.in_grid = True
        return cell

    # ---- results -----------------------------------------------------------------------------------------------------

    def path(self, cell):
        return self.results / f"{cell.name}.json"

    def read(self, cell):
        """What was kept of a cell, done or failed; None where it has not been run."""
        return read_json(self.path(cell))

    def picture(self, cell_name, pattern):
        """Where what an evaluation has drawn is kept: beside the cell's JSON."""
        return self.results / f"{cell_name}.{pattern.replace('*', '').replace('_.', '.')}"

    def pictures_of(self, cell):
        """Patterns of the files that a figure shows of this cell: each row's first seed is shown."""
        shown = [figure for figure in self.spec.get("figure", []) if figure["kind"] == "pictures"]
        if cell.in_grid or cell.seed != self.at_budget["seeds"][0]:
            return []
        return [figure["file"] for figure in shown if is_in(figure, cell.row, cell.column)]

    def finals(self, row, column):
        """What was kept of a row's cells in a column, one per seed that has been run."""
        return [result for cell in self.final_cells(row, column) if (result := self.read(cell)) is not None]

    def final_cells(self, row, column):
        """A row's cells in a column, one per seed; none while its grid has not ended."""
        _, chosen = self.search(self.tuned(row), column)
        return [] if chosen is None else [self.cell(row, column, seed, chosen) for seed in self.seeds(row)]


def is_in(figure, row_name, column_name):
    """Whether a figure shows a row in a column, by their names."""
    rows = figure.get("rows", ["*"])
    return column_name in figure.get("columns", [column_name]) and any(fnmatchcase(row_name, p) for p in rows)


def best_of(cells, results, score):
    """The cell of the highest score; of equal ones the first; None where no run has that score."""
    scores = [score_of(result, score) for result in results]
    scored = [(cell, value) for cell, value in zip(cells, scores, strict=True) if value is not None and value == value]
    return max(scored, key=lambda pair: pair[1], default=(None, None))[0]


def score_of(result, score, take="trained"):
    """One number of what was kept of a cell; None where it failed or has no such number.

    score: "linear.top1", "cluster[k-means *].ami", "cluster[codes].nmi", or a name such as "cpu_s.train".
    take: "trained", the name of a baseline, or an epoch's checkpoint, such as "checkpoint0001.pth"."""
    name, method, key = parts_of(score)
    if result["status"] != "done":
        return None
    if name not in result["scores"]:
        return result.get(name, {}).get(key)
    rows = [row for row in result["scores"][name] if row["checkpoint"] == take]
    rows = [row for row in rows if method is None or fnmatchcase(row.get("method", ""), method)]
    return rows[0].get(key) if rows else None


def epochs_of(result, evaluation):
    """{epoch, from 1: name} of the checkpoints that an evaluation of `checkpoints = "all"` has scored."""
    names = [row["checkpoint"] for row in result["scores"][evaluation]]
    kept = {int(found[1]): name for name in names if (found := re.fullmatch(r"checkpoint(\d+)\.pth", name))}
    return dict(sorted((kept | {result["log"]["epoch"] + 1: "trained"}).items()))  # the log counts from 0


def parts_of(score):
    """ "cluster[codes].ami" -> ("cluster", "codes", "ami")."""
    found = re.fullmatch(r"(\w+)(?:\[(.+)\])?\.(\w+)", score)
    if found is None:
        raise UserError(f"score {score}: expected NAME.KEY or NAME[METHOD].KEY, such as cluster[codes].ami")
    return found.groups()


def read_experiment(path, budget, overrides=None, results=RESULTS, columns=None):
    """overrides: {flag: value} over the file's.  columns: names of the only columns that are meant.

    Raises UserError for a file that cannot be read or that does not hold together."""
    try:
        spec = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        there = ", ".join(sorted(file.stem for file in ROOT.glob("*.toml")))
        raise UserError(f"{path}: cannot be read ({error}); experiments that there are: {there}") from None
    spec["row"] = [one for row in spec.get("row", []) for one in varied(row)]
    check(path, spec, budget)
    if unknown := sorted(set(columns or ()) - {column["name"] for column in spec["column"]}):
        raise UserError(f"{path}: no column {unknown[0]}; it has {', '.join(c['name'] for c in spec['column'])}")
    return Experiment(Path(path).stem, spec, budget, overrides, results, columns)


def varied(row):
    """The rows that one with `vary` stands for."""
    vary = row.get("vary", {})
    for values in itertools.product(*vary.values()):
        point = dict(zip(vary, values, strict=True))
        name = row["name"].format(**point) if vary else row["name"]
        yield row | {"name": name, "flags": row.get("flags", {}) | point}


def filled(value, flags):
    """ "runs/planted/{out_dim}" -> "runs/planted/16"."""
    return value.format(**flags) if isinstance(value, str) else value


def check(path, spec, budget):
    """That names in it mean something: an experiment runs for hours before a misspelt one would be missed."""
    check_keys(path, spec)
    budgets = spec.get("budget", {})
    if budget not in budgets:
        raise UserError(f"{path}: no budget {budget}; it has {', '.join(budgets)}")
    if not budgets[budget].get("seeds"):
        raise UserError(f"{path}: budget {budget} has no seeds; expected such as seeds = [0, 1, 2]")
    for kind in ("row", "column"):
        names = [part["name"] for part in spec.get(kind, [])]
        asked = {name for of_budget in budgets.values() for name in of_budget.get(f"{kind}s", [])}
        if not names or len(set(map(slug, names))) < len(names) or asked - set(names):
            raise UserError(f"{path}: its {kind}s are {', '.join(names)}; expected some, no two alike as file names, "
                            f"and among them {', '.join(sorted(asked)) or 'any'}")  # fmt: skip
    for row in spec["row"]:
        check_grid(path, spec, row)


def check_keys(path, spec):
    """Raises UserError for a key that nobody reads."""
    parts = [("", spec), *((kind, part) for kind in LISTS for part in spec.get(kind, []))]
    parts += [("budget", part) for part in spec.get("budget", {}).values()]
    parts += [(kind, spec[kind]) for kind in ("tune", "log") if kind in spec]
    for kind, part in parts:
        if unknown := sorted(set(part) - KEYS[kind]):
            where = f"[{kind}] {part.get('name', '')}".strip() if kind else path
            raise UserError(f"{path}: {where}: {unknown[0]} means nothing; expected {', '.join(sorted(KEYS[kind]))}")
        if kind in LISTS and "name" not in part:
            raise UserError(f"{path}: a [[{kind}]] has no name")


def check_grid(path, spec, row):
    """Raises UserError where a row's grid, or the row whose choice it takes, cannot be."""
    tuned = [other["name"] for other in spec["row"] if "tune" in other]
    if "like" in row and row["like"] not in tuned:
        raise UserError(f"{path}: row {row['name']} is like {row['like']}; rows with a grid: {', '.join(tuned)}")
    if "tune" not in row:
        return
    tune = spec.get("tune", {})
    if missing := sorted({"evaluate", "score"} - set(tune)):
        raise UserError(f"{path}: row {row['name']} has a grid, and [tune] no {missing[0]}")
    if unknown := sorted(set(tune["evaluate"]) - set(spec.get("evaluate", {}))):
        raise UserError(f"{path}: [tune] evaluate: there is no [evaluate.{unknown[0]}]")
    if (name := parts_of(tune["score"])[0]) not in tune["evaluate"]:
        raise UserError(f"{path}: [tune] score = {tune['score']}: expected {name} among its `evaluate`")
    known = row.get("flags", {}) | spec.get("flags", {})
    if untold := [flag for flag, _ in [*tune.get("first", []), *row["tune"]] if flag not in known]:
        raise UserError(f"{path}: row {row['name']} tunes {untold[0]}; expected its value before that in its flags")


def read_json(path):
    """None where there is no such file. Raises UserError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it, the cell is run again") from None


def words_of(flags):
    """{"lr": 0.1, "flag": True, "scale": [0.2, 1]} -> ["--lr", "0.1", "--flag", "--scale", "0.2", "1"]."""
    words = []
    for flag, value in flags.items():
        if value is False:
            words.append(f"--no-{flag}")
        else:
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{flag}", *map(str, values)]
    return words


def slug(text):
    """Part of a file's name that shows what it was: "CPLearn, K = 1024" -> "CPLearn_K=1024"."""
    return re.sub(r"[^\w.=+-]+", "_", re.sub(r"\s*=\s*", "=", text)).strip("_")
