"""--log_to: the lines of log.txt, forwarded to wandb, MLflow or trackio, by a thread that training never waits for.

    forwarder = Forwarder("wandb", output_dir, args)
    forwarder.send({"kind": "step", "step": 50, "train_loss": 2.0})        # returns at once
    forwarder.close()                                                      # waits CLOSE_S at most

Whatever goes wrong there is one warning, and nothing more is forwarded: log.txt has it all. A run that goes on goes on
in the same run of the logger: its name is kept in <output_dir>/.log_to.json. Where the logger can be offline it is,
unless the environment says otherwise (WANDB_MODE, MLFLOW_TRACKING_URI; trackio is local, its folder is TRACKIO_DIR).
"""

import contextlib
import importlib
import json
import os
import queue
import threading
import uuid
from pathlib import Path

from running.files import write_whole
from utils import UserError, one_line

LOGGERS = ("wandb", "mlflow", "trackio")
PACKAGES = {"mlflow": "mlflow-skinny"}  # what pip calls them, where that is another name
WAITING = 10_000  # lines that wait while a logger is slow; those that come then are left out, and counted
CLOSE_S = 30.0  # what the end of a run waits for its last lines


def add_logger_arguments(parser):
    parser.add_argument(
        "--log_to", choices=LOGGERS, default=None,
        help="forward the lines of log.txt to this logger too, from a thread; offline where it can be (WANDB_MODE, "
        "MLFLOW_TRACKING_URI and TRACKIO_DIR say otherwise); what fails there never touches the run",
    )  # fmt: skip


def require(name):
    """Import the logger's package, before a run begins. Raises UserError."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # of a package that is there and does not load, as well
        raise UserError(
            f"--log_to {name}: the package does not load ({one_line(error)}); pip install {PACKAGES.get(name, name)}"
        ) from None


class Forwarder:
    """Lines go into a queue, and from there to the logger, in a thread of its own."""

    def __init__(self, name, output_dir, flags, say=print):
        """flags: {flag: value} of the run.  say: called with a sentence where something has gone wrong."""
        self.name, self.say, self.lines, self.left_out = name, say, queue.Queue(WAITING), 0
        self.failed = threading.Event()
        begin = {"wandb": into_wandb, "mlflow": into_mlflow, "trackio": into_trackio}[name]
        arguments = (begin, Path(output_dir), flags, kept_name(Path(output_dir), name, say))
        self.thread = threading.Thread(target=self._forward, args=arguments, name=f"log to {name}", daemon=True)
        self.thread.start()

    def send(self, line):
        if self.failed.is_set():
            return
        try:
            self.lines.put_nowait(dict(line))
        except queue.Full:
            self.left_out += 1

    def close(self):
        if not self.failed.is_set():
            with contextlib.suppress(queue.Full):
                self.lines.put(None, timeout=CLOSE_S)
        self.thread.join(CLOSE_S)
        if self.thread.is_alive():
            self.say(f"warning: --log_to {self.name}: not done after {CLOSE_S:g} s, left alone; log.txt has all lines")
        if self.left_out:
            self.say(f"warning: --log_to {self.name}: too slow, {self.left_out} lines were left out; log.txt has them")

    def _forward(self, begin, output_dir, flags, name):
        try:
            with begin(require(self.name), output_dir, flags, name) as log:
                while (line := self.lines.get()) is not None:
                    log({f"{line['kind']}/{key}": value for key, value in line.items() if is_number(key, value)},
                        line["step"])  # fmt: skip
        except BaseException as error:  # a logger's own threads and exits are nothing to a run
            self.failed.set()
            self.say(
                f"warning: --log_to {self.name} failed: {one_line(error)}; nothing more is forwarded, log.txt has it"
            )


def is_number(key, value):
    return isinstance(value, int | float) and not isinstance(value, bool) and key not in ("step", "kind")


def kept_name(output_dir, logger, say):
    """The name of the run in a logger, made at its first start and kept in the folder."""
    path, names = output_dir / ".log_to.json", {}
    try:
        names = dict(json.loads(path.read_text()))
    except FileNotFoundError:  # the first start
        pass
    except (OSError, TypeError, ValueError) as error:
        say(f"warning: --log_to {logger}: {path} cannot be read ({one_line(error)}): the run begins anew there")
    if not isinstance(names.get(logger), str):
        names[logger] = uuid.uuid4().hex[:16]
        with contextlib.suppress(OSError):  # a run that cannot write here says so elsewhere
            write_whole(path, json.dumps(names))
    return names[logger]


# ---- the loggers: each yields a function of ({name: number}, step) ---------------------------------------------------


@contextlib.contextmanager
def into_wandb(wandb, output_dir, flags, name):
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "cplearn"), id=name, name=output_dir.name, resume="allow",
        config=flags, dir=str(output_dir), mode=os.environ.get("WANDB_MODE", "offline"),
        settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    run.define_metric("*", step_metric="step")  # wandb's own step never goes back, and a run that goes on may
    try:
        yield lambda numbers, step: run.log(numbers | {"step": step})
    finally:
        run.finish()


@contextlib.contextmanager
def into_mlflow(mlflow, output_dir, flags, name):
    if "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # asked for since MLflow 3.12
        mlflow.set_tracking_uri((output_dir / "mlruns").resolve().as_uri())
    client = mlflow.MlflowClient()
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME", "cplearn")
    experiment = client.get_experiment_by_name(project)
    experiment = experiment.experiment_id if experiment else client.create_experiment(project)
    earlier = client.search_runs([experiment], f"tags.cplearn_run = '{name}'", max_results=1)
    if earlier:
        run = earlier[0].info.run_id
    else:
        run = client.create_run(experiment, run_name=output_dir.name, tags={"cplearn_run": name}).info.run_id
        for flag, value in flags.items():
            client.log_param(run, flag, str(value)[:500])
    client.set_terminated(run, "RUNNING")

    def log(numbers, step):
        for key, value in numbers.items():
            client.log_metric(run, key.replace("@", "_"), value, step=step)

    try:
        yield log
    finally:
        client.set_terminated(run, "FINISHED")


@contextlib.contextmanager
def into_trackio(trackio, output_dir, flags, name):
    project = os.environ.get("TRACKIO_PROJECT", "cplearn")
    flags = {flag: str(value) for flag, value in flags.items()}
    run = trackio.init(project=project, name=f"{output_dir.name} {name}", config=flags, resume="allow", embed=False)
    try:
        yield lambda numbers, step: run.log(numbers, step=step)
    finally:
        run.finish()
