"""Run the experiments of experiments/*.toml: tables of the paper and our own, cell by cell, and what they come to.

    python run_experiments.py experiments/comparison.toml --budget smoke              # minutes
    python run_experiments.py experiments/comparison.toml --budget short --jobs 2     # what a CPU does in a night
    python run_experiments.py experiments/comparison.toml --budget paper --list        # its cells, and which are done
    python run_experiments.py experiments/comparison.toml --budget paper --submit "--partition gpu --cpus_per_task 8"

A cell is a training command and its evaluations, for one row (an objective and its flags), one column (a data set) and
one seed. Each command is one of this repository's own. What is kept of a cell is one JSON file in experiments/results:
commands, commit, seed, versions, times, the log's last line, all scores. The same command again passes over the cells
that are done and goes on where it was, within a training too. A cell that failed is kept as failed, and shown as such;
--again runs it anew. Tables and figures are made from these files: python -m experiments.tables.
"""

import concurrent.futures
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import images
from checkpoint import load_checkpoint, lock_folder
from experiments import RESULTS, Experiment, read_experiment, read_json, score_of, words_of
from utils import ArgumentParser, UserError, command_line, commit, make_folder, one_line, positive

ROOT = Path(__file__).resolve().parent
OWN_ERRORS = (1, 2)  # exit codes of an error that a restart does not cure; any other: ended from outside
LEFT_OUT = ("grid", "per_class", "verdicts")  # of the rows of evaluations: long, and in the run's folder


def get_args_parser():
    parser = ArgumentParser("run_experiments.py", "Run the cells of an experiment that are not done yet.")
    add = parser.add_argument
    add("experiment", metavar="FILE", help="experiments/NAME.toml")
    add("--budget", default="short", help="which of the file's budgets, such as smoke, short or paper")
    add("--jobs", type=positive(int), default=1, help="cells at a time on this machine; they share its CPUs")
    add("--nproc", type=positive(int), default=1, help="processes of each training: torchrun --nproc_per_node")
    add("--cell", nargs="+", default=None, metavar="NAME", help="only these, by the names that --list prints")
    add("--column", nargs="+", default=None, metavar="NAME", help="only these of the file's columns")
    add("--list", action="store_true", help="print the cells that are known by now, and what became of them")
    add("--again", nargs="+", default=[], metavar="NAME", help="run these cells anew; `failed`: all that failed")
    add("--set", nargs="+", default=[], metavar="FLAG=VALUE", dest="overrides",
        help="flags of every training, over those of the file")  # fmt: skip
    add("--data", nargs="+", default=[], metavar="NAME=FOLDER",
        help="the images of a small set, such as cifar10, from this folder of train/ and test/ (or val/), each with a "
        "folder per class, instead of torchvision's files")  # fmt: skip
    add("--device", default=None, help="of every command (default: theirs)")
    add("--submit", default=None, metavar="FLAGS",
        help="a SLURM job per cell, through run_with_submitit.py with these flags; then call this program again, with "
        "--list, or to submit what a grid has chosen")  # fmt: skip
    add("--output_dir", default="runs/experiments", help="where the runs are, NAME/BUDGET/CELL; they may be deleted")
    add("--results_dir", default=str(RESULTS), help="where one JSON per cell is kept (default: experiments/results)")
    return parser


@command_line
def main(argv=None):
    args = get_args_parser().parse_args(argv)
    overrides = pairs(args.overrides, "--set")
    experiment = read_experiment(args.experiment, args.budget, overrides, args.results_dir, args.column)
    runner = Runner(experiment, args)
    if args.list:
        print("\n".join(runner.listed()))
    elif args.submit is not None:
        runner.submit()
    else:
        sys.exit(runner.run_all())


def pairs(words, flag):
    """["lr=0.1"] -> {"lr": "0.1"}."""
    for word in words:
        if "=" not in word:
            raise UserError(f"{flag} {word}: expected NAME=VALUE")
    return dict(word.split("=", 1) for word in words)


class Runner:
    """The cells of an experiment, and what runs them."""

    def __init__(self, experiment: Experiment, args):
        self.experiment, self.args = experiment, args
        self.folder = Path(args.output_dir) / experiment.name / experiment.budget
        self.folders = pairs(args.data, "--data")
        if unknown := sorted(set(self.folders) - set(images.DATASETS) | {"imagefolder"} & set(self.folders)):
            small = ", ".join(sorted(set(images.DATASETS) - {"imagefolder"}))
            raise UserError(f"--data {unknown[0]}: no small set of that name; there are {small}")
        self.again = set(args.again)
        self.processes, self.ended_by = {}, None
        self.mutex = threading.Lock()
        self.begun = 0

    # ---- which cells -------------------------------------------------------------------------------------------------

    def cells(self):
        """Those that are known by now, and asked for. Raises UserError for a name that is none of them."""
        cells = self.experiment.plan()
        asked = set(self.args.cell or []) | (self.again - {"failed"})
        if unknown := sorted(asked - {cell.name for cell in cells}):
            raise UserError(f"{unknown[0]}: no such cell, or not known before its grid has ended; see --list")
        return [cell for cell in cells if self.args.cell is None or cell.name in self.args.cell]

    def left(self):
        return [cell for cell in self.cells() if self.state(cell) == "open"]

    def state(self, cell):
        """done, failed, or open: to be run."""
        result = self.experiment.read(cell)
        if result is None or cell.name in self.again:
            return "open"
        if result["status"] == "failed":
            return "open" if "failed" in self.again else "failed"
        if not result["train"].startswith(asked := self.shown(self.asked(cell)) + " "):
            raise UserError(
                f"{self.experiment.path(cell)}: made by `{result['train']}`, while `{asked}...` is asked for now; "
                f"--results_dir FOLDER keeps yours apart, --again {cell.name} makes this one anew"
            )
        return "done"

    def listed(self):
        cells = self.cells()
        states = [self.state(cell) for cell in cells]
        for cell, state in zip(cells, states, strict=True):
            yield f"{state:6s} {cell.name}"
        yield f"{len(cells)} cells by now: {', '.join(f'{states.count(s)} {s}' for s in ('done', 'failed', 'open'))}"

    # ---- their commands ----------------------------------------------------------------------------------------------

    def folder_of(self, cell):
        return self.folder / cell.name

    def asked(self, cell):
        """The words of the training, without where it runs and where it writes."""
        return [cell.script, *words_of(self.from_folder(cell.flags)), "--seed", str(cell.seed)]

    def words(self, cell, name):
        """Of a cell's training or one of its evaluations. What a training leaves, an evaluation's words may name."""
        return self.training(cell) if name == "train" else self.evaluation(cell, name)

    def training(self, cell):
        return [*self.asked(cell), "--output_dir", str(self.folder_of(cell)), *self.device()]

    def evaluation(self, cell, name):
        flags = {flag: value for flag, value in cell.evaluations[name].items() if flag != "keep"}
        script, checkpoints = flags.pop("script", f"eval_{name}.py"), flags.pop("checkpoints", "last")
        folder = self.folder_of(cell)
        files = [folder / "checkpoint.pth", *(copies_in(folder) if checkpoints == "all" else [])]
        words = [script, "--checkpoint", *map(str, files), "--seed", str(cell.seed), *words_of(flags)]
        if data_path := self.from_folder(cell.flags).get("data_path"):
            words += ["--data_path", data_path]
        places = ["--features_dir", str(folder / "features"), "--output_dir", str(folder)]
        return [*words, *self.device(), *places]

    def from_folder(self, flags):
        """The flags, with the images of a small set taken from a folder where --data says so."""
        if flags.get("dataset") not in self.folders:
            return flags
        own = images.DATASETS[flags["dataset"]]
        folder = {"dataset": "imagefolder", "data_path": self.folders[flags["dataset"]]}
        return {"img_size": own["img_size"], "mean": list(own["mean"]), "std": list(own["std"])} | flags | folder

    def device(self):
        return [] if self.args.device is None else ["--device", self.args.device]

    def shown(self, words):
        """A command as one would type it."""
        launcher = ["torchrun", f"--nproc_per_node={self.args.nproc}"] if self.is_distributed(words) else ["python"]
        return shlex.join([*launcher, *words])

    def is_distributed(self, words):
        return self.args.nproc > 1 and words[0] == "main_cplearn.py"

    # ---- running them ------------------------------------------------------------------------------------------------

    def run_all(self):
        """Until no cell is open; returns the exit code: 0 where all are done."""
        make_folder(self.folder)
        make_folder(self.experiment.results, "--results_dir")
        lock = lock_folder(self.folder)
        unfinished = set()
        with signals_to(self.stop), concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
            while cells := [cell for cell in self.left() if cell.name not in unfinished]:
                self.again -= {cell.name for cell in cells} | {"failed"}
                self.begun = 0
                for cell, done in zip(cells, pool.map(lambda cell: self.run(cell, len(cells)), cells), strict=True):
                    if not done:
                        unfinished.add(cell.name)
                if self.ended_by is not None:
                    break
        lock.close()
        if self.ended_by is not None:
            say(f"stopped by signal {self.ended_by}; the same command goes on")
            return 128 + self.ended_by
        states = [self.state(cell) for cell in self.cells()]
        say(f"{states.count('done')} cells done, {states.count('failed')} failed, {states.count('open')} open: "
            f"{self.experiment.results}")  # fmt: skip
        return 0 if set(states) <= {"done"} else 1

    def run(self, cell, count):
        """Train and evaluate; returns whether the cell has come to an end, good or bad."""
        if self.ended_by is not None:
            return False
        with self.mutex:
            self.begun += 1
            number = self.begun
        folder = self.folder_of(cell)
        make_folder(folder)
        for name in ("train", *cell.evaluations):
            words = self.words(cell, name)
            code = self.run_step(folder, name, words)
            if code == 0:
                continue
            where = folder / f"{name}.txt"
            if code in OWN_ERRORS:
                self.keep(cell, {"status": "failed", "failed": self.shown(words), "error": last_line(where)})
                say(f"[{number}/{count}] {cell.name}: failed: {last_line(where)} ({where})")
                return True
            if self.ended_by is None:
                say(f"[{number}/{count}] {cell.name}: {name} ended by exit code {code}; the same command goes on")
            return False
        scores = {name: self.rows_of(cell, name, folder) for name in cell.evaluations}
        self.keep_pictures(cell, folder)
        result = self.keep(cell, {"status": "done", "scores": scores} | self.curves(cell, folder))
        shutil.rmtree(folder / "features", ignore_errors=True)
        say(f"[{number}/{count}] {cell.name}: done in {sum(result['cpu_s'].values()):.0f} CPU-s; {summary(result)}")
        return True

    def run_step(self, folder, name, words):
        """Run one command, unless an earlier start has; returns its exit code. Its output and cost lie beside it."""
        cost = folder / f"{name}.json"
        before = read_json(cost) or {"starts": 0, "cpu_s": 0.0, "wall_s": 0.0, "memory_mb": 0.0}
        if before.get("code") == 0 and before["command"] == self.shown(words):
            return 0
        started = time.monotonic()
        # a start that is killed with the machine leaves this line, and no time: then the sums are too low
        write_json(cost, before | {"starts": before["starts"] + 1, "command": self.shown(words), "code": None})
        with open(folder / f"{name}.txt", "a") as output:
            code, usage = self.start(words, output)
        found = {
            "starts": before["starts"] + 1,
            "cpu_s": before["cpu_s"] + usage.ru_utime + usage.ru_stime,
            "wall_s": before["wall_s"] + time.monotonic() - started,
            "memory_mb": max(before["memory_mb"], usage.ru_maxrss / 1024),  # of the largest process
            "command": self.shown(words),
            "code": code,
        }
        write_json(cost, found)
        return code

    def start(self, words, output):
        """(exit code, what it used) of a command that runs in this repository."""
        script = str(ROOT / words[0])
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={self.args.nproc}"]
        command = [*(launcher if self.is_distributed(words) else [sys.executable]), script, *words[1:]]
        threads = str(max(1, cpus() // (self.args.jobs * self.args.nproc)))
        environment = {"OMP_NUM_THREADS": threads} | os.environ | {"PYTHONPATH": str(ROOT)}
        with self.mutex:
            if self.ended_by is not None:
                return 128 + self.ended_by, NOTHING_USED
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            self.processes[process.pid] = process
        _, status, usage = os.wait4(process.pid, 0)
        with self.mutex:
            del self.processes[process.pid]
        code = os.waitstatus_to_exitcode(status)
        process.returncode = code
        return (code if code >= 0 else 128 - code), usage

    def stop(self, number, _frame):
        """Hand the signal on: a training saves, and says with its exit code that it wants to go on."""
        self.ended_by = number
        for process in list(self.processes.values()):
            process.send_signal(number)

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def keep(self, cell, found):
        """Write the cell's JSON, whole or not at all."""
        folder = self.folder_of(cell)
        costs = {name: read_json(folder / f"{name}.json") for name in ("train", *cell.evaluations)}
        costs = {name: cost for name, cost in costs.items() if cost is not None}
        result = {
            "experiment": cell.experiment,
            "budget": cell.budget,
            "row": cell.row,
            "column": cell.column,
            "seed": cell.seed,
            "chosen": cell.chosen,
            "train": self.shown(self.training(cell)),
            "evaluations": {name: self.shown(self.evaluation(cell, name)) for name in cell.evaluations},
            "commit": commit(),
            "cpu_s": {name: round(cost["cpu_s"], 1) for name, cost in costs.items()},
            "wall_s": {name: round(cost["wall_s"], 1) for name, cost in costs.items()},
            "memory_mb": {name: round(cost["memory_mb"]) for name, cost in costs.items()},
            "starts": {name: cost["starts"] for name, cost in costs.items()},
        } | found
        path = self.experiment.path(cell)
        make_folder(path.parent, "--results_dir")
        write_json(path, result)
        return result

    def rows_of(self, cell, name, folder):
        """The rows of an evaluation's table: of the trained model, of its earlier checkpoints and of baselines where
        there are any."""
        rows = read_json(folder / f"results_{name}.json")["rows"]
        names = {str(folder / "checkpoint.pth"): "trained", "checkpoint.pth": "trained"}  # alone, and beside others
        rows = [row | {"checkpoint": names.get(row["checkpoint"], row["checkpoint"])} for row in rows]
        return [{key: value for key, value in row.items() if key not in LEFT_OUT} for row in rows]

    def keep_pictures(self, cell, folder):
        """Copy what evaluations have drawn for the experiment's figures; a collapsed model lacks some."""
        make_folder(self.experiment.path(cell).parent, "--results_dir")
        for pattern in self.experiment.pictures_of(cell):
            for drawn in folder.glob(pattern):
                shutil.copyfile(drawn, self.experiment.picture(cell.name, pattern))

    def curves(self, cell, folder):
        """The log's last line, numbers of all lines where the experiment asks for them, what else evaluations have to
        be kept of, sizes of files, versions."""
        lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        last = next((line for line in reversed(lines) if line["kind"] == "step"), {})
        kept = {name: [line.get(name) for line in lines if line["kind"] == "step"] for name in self.keep_of_log()}
        found = {"log": last, "sizes": sizes_mib(folder / "checkpoint.pth")}
        if kept:
            found["lines"] = kept
        for name, flags in cell.evaluations.items():
            results = read_json(folder / f"results_{name}.json")
            found["versions"] = results["versions"]
            if keep := flags.get("keep"):
                found.setdefault("kept", {})[name] = {key: deep(results, key, folder) for key in keep}
        return found

    def keep_of_log(self):
        return self.experiment.spec.get("log", {}).get("keep", [])

    # ---- on SLURM ----------------------------------------------------------------------------------------------------

    def submit(self):
        """A job for each cell that is open: this program, with that cell alone."""
        names = [cell.name for cell in self.left()]
        if not names:
            say("nothing to submit: every cell that is known by now has been run")
            return
        own = [self.args.experiment, "--budget", self.args.budget, "--nproc", str(self.args.nproc)]
        own += ["--output_dir", self.args.output_dir, "--results_dir", self.args.results_dir]
        own += ["--set", *self.args.overrides] if self.args.overrides else []
        own += ["--data", *self.args.data] if self.args.data else []
        own += ["--column", *self.args.column] if self.args.column else []
        own += ["--again", *self.args.again] if self.args.again else []
        launcher = [sys.executable, str(ROOT / "run_with_submitit.py"), "--script", "run_experiments", "--ngpus", "1"]
        command = [*launcher, *shlex.split(self.args.submit), "--array", "cell", *names, *own]
        if code := subprocess.run(command).returncode:
            raise UserError(f"run_with_submitit.py ended with {code}; nothing was submitted")


NOTHING_USED = type("Usage", (), {"ru_utime": 0.0, "ru_stime": 0.0, "ru_maxrss": 0})


def deep(results, key, folder):
    """results["curves"]["spectrum"] by "curves.spectrum"; curves are of models, and the trained one's are meant."""
    for part in key.split("."):
        results = results.get(part)
        for name in ("checkpoint.pth", str(folder / "checkpoint.pth")):
            results = results.get(name, results) if isinstance(results, dict) else results
    return results


def copies_in(folder):
    """checkpoint0001.pth and so on, in their order; the last is checkpoint.pth under another name."""
    return sorted(folder.glob("checkpoint[0-9]*.pth"))[:-1]


def sizes_mib(path):
    """Of the file, and in it of the weights of backbone and head; in units of 2^20 bytes, as in the paper's Table 8."""
    weights = [x for x in load_checkpoint(path)["student"].values() if hasattr(x, "nbytes")]
    found = {"checkpoint_mib": path.stat().st_size, "state_dict_mib": sum(x.nbytes for x in weights)}
    return {name: round(size / 2**20, 3) for name, size in found.items()}


def summary(result):
    """A few of a cell's scores, for the terminal."""
    shown = {"knn.top1": ".2f", "linear.top1": ".2f", "few.top1": ".2f", "cluster[codes].ami": ".3f"}
    found = {name: score_of(result, name) for name in shown}
    return ", ".join(f"{name} {value:{shown[name]}}" for name, value in found.items() if value is not None)


def last_line(path):
    """Of a command's output, the last line that tells an error, or else the last one."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if "rror" in line]
    return one_line((errors or lines)[-1], 400)


def write_json(path, value):
    """Whole or not at all; a line for each of its keys."""
    aside = path.with_name(f".{path.name}.tmp")
    lines = [f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()]
    aside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(aside, path)


class signals_to:
    """Inside, SIGTERM, SIGINT and SIGUSR2 call a function."""

    def __init__(self, function):
        self.function = function

    def __enter__(self):
        self.before = {number: signal.signal(number, self.function)
                       for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}  # fmt: skip

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    main()
