"""Run the experiments of experiments/*.toml: tables of the paper and our own, cell by cell, and what they come to.

    python run_experiments.py experiments/comparison.toml --budget smoke              # minutes
    python run_experiments.py experiments/comparison.toml --budget short --jobs 2     # what a CPU does in a night
    python run_experiments.py experiments/comparison.toml --budget paper --list        # its cells, and which are done
    python run_experiments.py experiments/comparison.toml --budget paper --submit "--partition gpu --cpus_per_task 8"

A cell is a training command and its evaluations, for one row (an objective and its flags), one column (a data set) and
one seed. Each command is one of this repository's own. What is kept of a cell is one JSON file in experiments/results:
commands, commit, seed, versions, times, the log's last line, all scores. The same command again passes over the cells
that are done and goes on where it was, within a training too, from its last checkpoint. The same command at the same
time, here or on another machine, shares the work. A cell that failed is kept as failed, and shown as such; --again runs
it anew. Tables, figures and pages are made from these files: python -m experiments.tables, .figures, .pages.

Exit codes: 0 all cells are done, 1 some have failed, 2 something typed is wrong, 75 some were ended from outside and
are open, 128 + a signal's number: stopped by it, trainings have saved.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import images
from checkpoint import load_checkpoint
from experiments import RESULTS, Experiment, read_experiment, read_json, score_of, words_of
from experiments.commands import Commands
from running.files import lock_folder, write_whole
from utils import UNFINISHED, ArgumentParser, UserError, command_line, commit, make_folder, one_line, positive

ROOT = Path(__file__).resolve().parent
OWN_ERRORS = (1, 2)  # exit codes of an error that a restart does not cure; any other: ended from outside
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)  # USR2: SLURM's, before a time limit
LOOK_AGAIN_S = 5.0  # at cells that another start of this program is at
NOTHING_YET = {"starts": 0, "uncounted_starts": 0, "commits": [], "cpu_s": 0.0, "wall_s": 0.0, "memory_mb": 0.0}
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
    add("--again", nargs="+", default=[], metavar="NAME",
        help="forget these cells, `failed`: all that failed, and run them anew; a training whose evaluation failed is "
        "kept")  # fmt: skip
    add("--set", nargs="+", default=[], metavar="FLAG=VALUE", dest="overrides",
        help="flags of every training, over those of the file")  # fmt: skip
    add("--data", nargs="+", default=[], metavar="NAME=FOLDER",
        help="the images of a small set, such as cifar10, from this folder of train/ and test/ (or val/), each with a "
        "folder per class, instead of torchvision's files")  # fmt: skip
    add("--device", default=None, help="of every command (default: theirs)")
    add("--submit", default=None, metavar="FLAGS",
        help="a SLURM job per cell, through run_with_submitit.py with these flags (a single word: --submit=--dry_run); "
        "then call this program again, with --list, or to submit what a grid has chosen")  # fmt: skip
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
        return
    runner.check()
    runner.forget(args.again)
    if args.submit is not None:
        runner.submit()
    elif code := runner.run_all():
        sys.exit(code)


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
        self.commands = Commands({"OMP_NUM_THREADS": self.threads()})
        self.running, self.ended_by = set(), None  # pids
        self.said = set()

    # ---- which cells -------------------------------------------------------------------------------------------------

    def cells(self):
        """Those that are known by now, and asked for. Raises UserError for a name that is none of them."""
        cells = self.experiment.plan()
        asked = set(self.args.cell or []) | set(self.args.again) - {"failed"}
        if unknown := sorted(asked - {cell.name for cell in cells}):
            raise UserError(f"{unknown[0]}: no such cell, or not known before its grid has ended; see --list")
        return [cell for cell in cells if self.args.cell is None or cell.name in self.args.cell]

    def left(self):
        return [cell for cell in self.cells() if self.state(cell) == "open"]

    def state(self, cell):
        """done, failed, or open: to be run, also where the file has got another evaluation since."""
        result = self.experiment.read(cell)
        if result is None or (result["status"] == "done" and set(cell.evaluations) - set(result["evaluations"])):
            return "open"
        if result["status"] == "done":
            for name in ("train", *cell.evaluations):
                made = result["train"] if name == "train" else result["evaluations"][name]
                asked = self.shown(self.words(cell, name))
                if self.but_places(made, cell) != self.but_places(asked, cell):
                    raise UserError(
                        f"{self.experiment.path(cell)}: made by `{made}`, while `{asked}` is asked for now; "
                        f"--results_dir FOLDER keeps yours apart, --again {shlex.quote(cell.name)} makes this one anew"
                    )
        return result["status"]

    def but_places(self, command, cell):
        """A command's words without the words of where it ran and wrote: the folder, the launcher, --device."""
        place = f"{cell.experiment}/{cell.budget}/{cell.name}"
        words = [word for word in shlex.split(command) if place not in word]
        at = words.index(next(word for word in words if word.endswith(".py")))
        words = words[at : words.index("--device")] if "--device" in words else words[at:]
        return [word for word in words if word not in ("--checkpoint", "--features_dir", "--output_dir")]

    def forget(self, names):
        """--again: what was kept of these cells goes, and their runs, but for a training whose evaluation failed."""
        cells = self.cells() if names else []
        for cell in cells:
            result = self.experiment.read(cell) or {"status": "open"}
            if cell.name not in names and not ("failed" in names and result["status"] == "failed"):
                continue
            with self.hold(cell) or refuse(f"--again {cell.name}: {self.holder(cell)} is at it"):
                if result["status"] != "failed" or result["failed"] == result["train"]:
                    shutil.rmtree(self.folder_of(cell), ignore_errors=True)
                self.experiment.path(cell).unlink(missing_ok=True)

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
        """Of one of a cell's commands. What a training leaves, an evaluation's words may name."""
        if name == "prepare":
            return cell.prepare
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
        sizes = {"img_size": own["img_size"], "mean": list(own["mean"]), "std": list(own["std"])}
        sizes |= {} if len(own["mean"]) == 3 else {"in_chans": len(own["mean"])}  # a folder's own are 3
        folder = {"dataset": "imagefolder", "data_path": self.folders[flags["dataset"]]}
        return sizes | flags | folder

    def device(self):
        return [] if self.args.device is None else ["--device", self.args.device]

    def shown(self, words):
        """A command as one would type it."""
        launcher = ["torchrun", *self.processes_of(words)] if self.is_distributed(words) else ["python"]
        return shlex.join([*launcher, *words])

    def processes_of(self, words):
        return ["--standalone", f"--nproc_per_node={self.args.nproc}"]  # standalone: on a port of its own

    def is_distributed(self, words):
        return self.args.nproc > 1 and words[0] == "main_cplearn.py"

    def check(self):
        """That there are cells of the names asked for, and that scripts take the words they will be given, before hours
        have passed. Raises UserError."""
        self.cells()
        for cell in self.experiment.every():
            for script, *words in (self.words(cell, name) for name in cell.steps):
                try:
                    parser_of(script).parse_args(words)
                except UserError as error:
                    where = f"{self.args.experiment}: row {cell.row}, column {cell.column}"
                    raise UserError(f"{where}: {error}") from None

    # ---- running them ------------------------------------------------------------------------------------------------

    def run_all(self):
        """Until no cell is open; returns the exit code."""
        make_folder(self.folder)
        make_folder(self.experiment.results, "--results_dir")
        with self.commands, signals_to(self.stop), concurrent.futures.ThreadPoolExecutor(self.args.jobs) as pool:
            try:
                self.run_in(pool)
            except BaseException:
                self.stop(signal.SIGTERM)  # else leaving the pool takes as long as its trainings
                raise
        if self.ended_by is not None:
            goes_on = "the same command, without --again, goes on" if self.args.again else "the same command goes on"
            say(f"stopped by {signal.Signals(self.ended_by).name}; {goes_on}")
            return 128 + self.ended_by
        states = [self.state(cell) for cell in self.cells()]
        for row, column in self.experiment.without_choice():
            say(f"{row}, {column}: not run, every run of its grid has failed")
        say(f"{states.count('done')} cells done, {states.count('failed')} failed, {states.count('open')} open: "
            f"{self.experiment.results}")  # fmt: skip
        return UNFINISHED if "open" in states else 1 if "failed" in states else 0

    def run_in(self, pool):
        running, ended_early = {}, set()
        while self.ended_by is None:
            passed_over = ended_early | {cell.name for cell in running.values()}
            held = False
            for cell in self.left():
                if cell.name in passed_over:
                    continue
                if len(running) == self.args.jobs:
                    break
                lock = self.take(cell)
                if lock is None:
                    held = True
                else:
                    running[pool.submit(self.run, cell, lock)] = cell
            if not running and not held:
                return
            for future in self.ended_of(running, LOOK_AGAIN_S if held else None):
                cell = running.pop(future)
                has_ended, line = future.result()
                ended_early |= set() if has_ended else {cell.name}
                say(f"[{self.progress()}] {cell.name}: {line}")

    def ended_of(self, running, timeout):
        """The cells at work that have ended, after waiting for one of them."""
        if not running:
            time.sleep(timeout)
        return concurrent.futures.wait(running, timeout, concurrent.futures.FIRST_COMPLETED).done

    def progress(self):
        """ "3/57": cells that have ended, good or bad, of all that are known by now."""
        return f"{len(self.cells()) - len(self.left())}/{len(self.cells())}"

    def run(self, cell, lock):
        """Train and evaluate; returns whether the cell has come to an end, good or bad, and a line about it."""
        with lock:
            folder = self.folder_of(cell)
            self.begin_anew_if_another(cell)
            make_folder(folder)
            for name in cell.steps:
                words = self.words(cell, name)
                if code := self.run_step(folder, name, words, lock):
                    return self.ended_badly(cell, name, words, code)
            scores = {name: self.rows_of(cell, name, folder) for name in cell.evaluations}
            found = {"status": "done", "scores": scores} | self.curves(cell, folder)
            self.keep_pictures(cell, folder)
            shutil.rmtree(folder / "features", ignore_errors=True)
            result = self.keep(cell, found)
            return True, f"done in {sum(result['cpu_s'].values()):.0f} CPU-s; {summary(result)}"

    def begin_anew_if_another(self, cell):
        """The file of the experiment may have changed since an earlier start; a training would not go on as another."""
        before = read_json(self.folder_of(cell) / "train.json")
        if before is not None and not before["command"].startswith(f"{self.shown(self.asked(cell))} "):
            say(f"{cell.name}: begins anew, what had been begun was `{before['command']}`")
            shutil.rmtree(self.folder_of(cell))

    def ended_badly(self, cell, name, words, code):
        where = self.folder_of(cell) / f"{name}.txt"
        if code == 128 + signal.SIGINT:  # a Ctrl-C is for all, and has reached the command first
            self.ended_by = self.ended_by or signal.SIGINT
        if code not in OWN_ERRORS or self.ended_by is not None:
            return False, f"{name} ended by exit code {code} ({where}); the same command goes on"
        error = last_line(where)
        self.keep(cell, {"status": "failed", "failed": self.shown(words), "error": error})
        return True, f"failed: {error} ({where})"

    def run_step(self, folder, name, words, lock):
        """Run one command, unless an earlier start has; returns its exit code. Its output and cost lie in `folder`."""
        path = folder / f"{name}.json"
        before = NOTHING_YET | (read_json(path) or {})
        if before.get("code") == 0 and before["command"] == self.shown(words):
            return 0
        if self.ended_by is not None:
            return 128 + self.ended_by
        started = time.monotonic()
        cost = before | {
            "starts": before["starts"] + 1,
            # what the last start cost is unknown where it was killed together with this program
            "uncounted_starts": before["uncounted_starts"] + ("code" in before and before["code"] is None),
            "commits": list(dict.fromkeys([*before["commits"], commit()])),
            "command": self.shown(words),
            "code": None,
        }
        write_json(path, cost)
        with open(folder / f"{name}.txt", "a") as output:
            code, cpu_s, memory_mb = self.start(words, output, lock)
        cost["cpu_s"] += cpu_s
        cost["wall_s"] += time.monotonic() - started
        cost["memory_mb"] = max(cost["memory_mb"], memory_mb)  # of the largest process
        write_json(path, cost | {"code": code})
        return code

    def start(self, words, output, lock):
        """[exit code, CPU seconds, MB of its largest process] of a command. It holds the cell's lock for as long as it
        lives, also where this program is killed before it."""
        launcher = ["-m", "torch.distributed.run", *self.processes_of(words)] if self.is_distributed(words) else []
        begins_at = output.tell()
        command = self.commands.start(words, output, lock, launcher=launcher)
        self.running.add(command.pid)
        if self.ended_by is not None:  # since the command was started, and before `stop` could know it
            self.stop(self.ended_by)
        sign(lock, command.pid)
        code, *used = command.wait()
        self.running.discard(command.pid)
        return [code_of_worker(output.name, begins_at) if launcher and code == 1 else code, *used]

    def threads(self):
        return str(max(1, cpus() // (self.args.jobs * self.args.nproc)))

    def stop(self, number, _frame=None):
        """End what is running. A training saves on SIGTERM; torchrun passes on no other signal, and of a Ctrl-C the
        terminal has told everybody already: a second one would end a training without saving."""
        self.ended_by = self.ended_by or number
        for pid in list(self.running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    # ---- whose turn it is --------------------------------------------------------------------------------------------

    def take(self, cell):
        """The cell's lock; or None, where another start of this program, or what it has left running, is at it."""
        lock = self.hold(cell)
        if lock is not None and self.state(cell) == "open":
            return lock
        if lock is not None:  # it came to its end a moment ago
            lock.close()
        elif cell.name not in self.said:
            self.said.add(cell.name)
            say(f"{cell.name}: {self.holder(cell)} is at it; waiting for its end")
        return None

    def hold(self, cell):
        """An open file whose lock this process and those that inherit the file hold until the last one ends; or None
        where others hold it, or a training that somebody started by hand in the cell's folder."""
        path = self.lock_of(cell)
        make_folder(path.parent)
        file = open(path, "a+")  # noqa: SIM115 (closing it would let the lock go)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.folder_of(cell).exists():
                lock_folder(self.folder_of(cell)).close()
        except (BlockingIOError, UserError):
            file.close()
            return None
        except OSError as error:
            say(f"warning: {path} is on a file system without locks ({error.strerror}); start no second run of a cell")
        sign(file, os.getpid())
        return file

    def lock_of(self, cell):
        """Beside the cell's folder, which may be removed under the lock."""
        folder = self.folder_of(cell)
        return folder.with_name(f".{folder.name}.lock")

    def holder(self, cell):
        return self.lock_of(cell).read_text().strip() or "another process"

    # ---- what is kept ------------------------------------------------------------------------------------------------

    def keep(self, cell, found):
        """Write the cell's JSON, whole or not at all."""
        folder = self.folder_of(cell)
        costs = {name: read_json(folder / f"{name}.json") for name in cell.steps}
        costs = {name: NOTHING_YET | cost for name, cost in costs.items() if cost is not None}
        commits = dict.fromkeys(name for cost in costs.values() for name in cost["commits"])
        result = {
            "experiment": cell.experiment,
            "budget": cell.budget,
            "row": cell.row,
            "column": cell.column,
            "seed": cell.seed,
            "chosen": cell.chosen,
            "OMP_NUM_THREADS": self.commands.environment["OMP_NUM_THREADS"],  # sums depend on it, in the last digits
            "train": self.shown(self.training(cell)),
            "evaluations": {name: self.shown(self.evaluation(cell, name)) for name in cell.evaluations},
            "commit": ", ".join(commits) or commit(),
            "cpu_s": {name: round(cost["cpu_s"], 1) for name, cost in costs.items()},
            "wall_s": {name: round(cost["wall_s"], 1) for name, cost in costs.items()},
            "memory_mb": {name: round(cost["memory_mb"]) for name, cost in costs.items()},
            "starts": {name: cost["starts"] for name, cost in costs.items()},
            # of these, killed together with this program: their times are missing above
            "uncounted_starts": {name: n for name, cost in costs.items() if (n := cost["uncounted_starts"])},
        } | found
        path = self.experiment.path(cell)
        make_folder(path.parent, "--results_dir")
        write_json(path, result)
        return result

    def rows_of(self, cell, name, folder):
        """The rows of an evaluation's table: of the trained model, of its earlier checkpoints and of baselines where
        there are any."""
        rows = results_of(folder, name)["rows"]
        names = {str(folder / "checkpoint.pth"): "trained", "checkpoint.pth": "trained"}  # alone, and beside others
        rows = [row | {"checkpoint": names.get(row["checkpoint"], row["checkpoint"])} for row in rows]
        return [{key: value for key, value in row.items() if key not in LEFT_OUT} for row in rows]

    def keep_pictures(self, cell, folder):
        """Copy what evaluations have drawn for the experiment's figures; a collapsed model lacks some."""
        make_folder(self.experiment.path(cell).parent, "--results_dir")
        for pattern in self.experiment.pictures_of(cell):
            for drawn in folder.glob(pattern):
                write_whole(self.experiment.picture(cell.name, pattern), Path(drawn).read_bytes())

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
            results = results_of(folder, name)
            found["versions"] = results["versions"]
            if keep := flags.get("keep"):
                found.setdefault("kept", {})[name] = {key: deep(results, key, folder) for key in keep}
        return found

    def keep_of_log(self):
        return self.experiment.spec.get("log", {}).get("keep", [])

    # ---- on SLURM ----------------------------------------------------------------------------------------------------

    def submit(self):
        """A job for each cell that is open: this program, with that cell alone. What --again names is forgotten by now,
        so that a job that comes back goes on."""
        names = [cell.name for cell in self.left()]
        if not names:
            say("nothing to submit: every cell that is known by now has been run")
            return
        own = [self.args.experiment, "--budget", self.args.budget, "--nproc", str(self.args.nproc)]
        own += ["--output_dir", self.args.output_dir, "--results_dir", self.args.results_dir, *self.device()]
        own += ["--set", *self.args.overrides] if self.args.overrides else []
        own += ["--data", *self.args.data] if self.args.data else []
        launcher = [sys.executable, str(ROOT / "run_with_submitit.py"), "--script", "run_experiments", "--ngpus", "1"]
        gpus = ["--gres", f"gpu:{self.args.nproc}"] if self.args.nproc > 1 and self.args.device != "cpu" else []
        command = [*launcher, *gpus, *shlex.split(self.args.submit), *own, "--array", "cell", *names]
        if code := subprocess.run(command).returncode:
            raise UserError(f"run_with_submitit.py ended with {code}; nothing was submitted")


@functools.cache
def parser_of(script):
    """What reads a script's flags."""
    if not (ROOT / script).is_file():
        raise UserError(f"{script}: no such script of this repository")
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")).get_args_parser()


def refuse(message):
    raise UserError(message)


def sign(lock, process):
    """Write into a lock's file who holds it."""
    lock.truncate(0)
    lock.write(f"host {socket.gethostname()}, process {process}\n")
    lock.flush()


def results_of(folder, name):
    path = folder / f"results_{name}.json"
    return read_json(path) or refuse(f"{path}: not there, although its evaluation has ended well; is NAME in "
                                     f"[evaluate.NAME] that of the script's results_NAME.json?")  # fmt: skip


def code_of_worker(path, begins_at):
    """torchrun's own exit code is 1, whatever ended its processes; what it prints at its end has theirs."""
    text = Path(path).read_bytes()[begins_at:].decode(errors="replace")
    codes = re.findall(r"exitcode +: (-?\d+)", text)
    return int(codes[-1]) if codes else 1  # the last one it prints is the first that was met


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
    ours = [line for line in lines if line.startswith("error")]
    errors = ours or [line for line in lines if "rror" in line]
    return one_line((errors or lines)[-1].replace(f"{ROOT}/", ""), 400)


def write_json(path, value):
    """Whole or not at all; a line for each of its keys."""
    lines = [f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()]
    write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")


class signals_to:
    """Inside, SIGNALS call a function; nohup's ignored SIGHUP stays ignored."""

    def __init__(self, function):
        self.function = function

    def __enter__(self):
        ignored = {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
        self.before = {number: signal.signal(number, self.function) for number in SIGNALS if number not in ignored}

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    main()
