"""make_report.py: what a folder tells, in whatever state it is, and a page that every browser shows."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64encode
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import make_report
from report import folder as folders
from report import read_run, report_page
from report.charts import MOST_POINTS, Series, thinned
from report.compare import score_of, scores
from report.words import headline
from running.files import lock_folder
from runs import flags, kill_at, launch, write_pictures
from utils import UserError

ROOT = Path(make_report.__file__).resolve().parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\x00"


def line(step, **changes):
    healthy = {
        "spread": 0.8, "rankme": 60.0, "rankme_max": 128, "num_codes": 64, "codes_used": 60, "images_counted": 4096,
        "batch_perplexity": 50.0, "images_per_mean": 128, "perplexity": 58.0, "entropy_share": 0.5, "gap": 1.0,
        "gap_share": 0.6, "train_loss": 3 - step / 1000, "train_prior": 0.2, "train_invariance": 2.0,
        "train_entropy": 1.0, "information": 2.5, "train_lr": 1e-3 * min(step, 20) / 20 - 1e-6 * step,
        "train_grad_norm": 1.0, "images_per_s": 256.0, "data_wait": 0.1, "memory_mb": 900.0,
    }  # fmt: skip
    return {"kind": "step", "step": step, "epoch": 0} | healthy | changes


def write_run(root, lines, starts=(), results=None, args=None):
    root.mkdir(parents=True, exist_ok=True)
    (root / "log.txt").write_text("".join(json.dumps(one) + "\n" for one in lines))
    if starts:
        (root / "starts.txt").write_text("".join(json.dumps(one) + "\n" for one in starts))
    for name, rows in (results or {}).items():
        (root / f"results_{name}.json").write_text(json.dumps({"rows": rows}))
        (root / f"results_{name}.md").write_text(
            "| checkpoint | top-1 % |\n|---|--:|\n| a | 1 |\n\n    python eval.py\n"
        )
    if args is not None:
        weights = {"backbone.w": torch.arange(4.0)}
        state = {
            "args": args,
            "teacher": weights,
            "student": weights,
            "effective_batch": 128,
            "step": lines[-1]["step"],
        }
        torch.save(state, root / "checkpoint.pth")
    return root


def start(step, **facts):
    return {"kind": "start", "step": step, "time": 1000.0 + step, "of": 100, "command": ["main_cplearn.py"]} | facts


def end(step, how):
    return {"kind": "end", "step": step, "time": 2000.0 + step, "how": how}


# ---- what a folder tells ---------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_lines_and_what_is_none_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "CHUNK", 3)
    lines = [line(step, new=step / 7) if step > 50 else line(step) for step in range(10, 101, 10)]
    lines[3]["train_loss"] = None
    lines[4]["train_loss"] = "no number"
    lines[5]["huge"] = 10**400
    write_run(tmp_path, lines)
    with open(tmp_path / "log.txt", "ab") as file:
        file.write(b'{"kind": "step"\n[]\n\xff\n{"kind": "step", "step": "1"}\n' + b"[" * 100_000 + b"\n")
    run = read_run(tmp_path)
    expected = [None if isinstance(one["train_loss"], str) else one["train_loss"] for one in lines]
    np.testing.assert_array_equal(run.steps["train_loss"], np.array(expected, np.float64))
    np.testing.assert_array_equal(run.steps["new"], [math.nan] * 5 + [step / 7 for step in range(60, 101, 10)])
    assert "huge" not in run.steps and any("5 lines are damaged" in text for text in run.missing)


def test_what_was_measured_before_the_first_step_is_the_first_point(tmp_path):
    lines = [{"kind": "start", "step": 0, "knn_top1": 40.0}, line(10), {"kind": "epoch", "step": 10, "knn_top1": 50.0}]
    run = read_run(write_run(tmp_path, lines))
    assert run.epochs["knn_top1"].tolist() == [40.0, 50.0] and run.epochs["step"].tolist() == [0, 10]
    assert '"x":[0,10],"y":[40,50]' in report_page([run]) and not any("damaged" in text for text in run.missing)


def test_a_thinned_curve_keeps_its_ends_and_its_peaks():
    rng = np.random.default_rng(0)
    y = rng.normal(size=100_000)
    y[[31_415, 27_182]] = 50.0, -50.0
    y[5] = math.nan
    found = thinned(Series("a", np.arange(len(y)), y), MOST_POINTS)
    assert len(found.x) <= MOST_POINTS + 2 and {0, 99_999, 31_415, 27_182} <= set(found.x.astype(int))
    np.testing.assert_array_equal(found.y, y[found.x.astype(int)])
    assert (np.diff(found.x) > 0).all()


@pytest.mark.parametrize(
    "starts, state",
    [
        ([start(0), end(100, "finished")], "finished"),
        ([start(0), end(50, "stopped by signal 12")], "stopped"),
        ([start(0), end(50, "failed: step 51: loss is nan")], "failed"),
        ([start(0), end(50, "stopped by signal 12"), start(50)], "stale"),
        ([start(0), end(100, "finished"), start(0, afresh=True)], "stale"),
        ([], "stale"),
    ],
)
def test_the_state_is_what_the_last_start_came_to(tmp_path, starts, state):
    run = read_run(write_run(tmp_path, [line(50)], starts))
    assert run.state == state and (state != "failed" or "loss is nan" in run.why)
    assert len(run.starts) == sum(one["kind"] == "start" for one in starts[2 * any(s.get("afresh") for s in starts) :])


def test_a_run_is_running_while_a_process_holds_its_folder_and_is_stale_where_that_is_silent(tmp_path):
    write_run(tmp_path, [line(50)], [start(0)])
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from running.files import lock_folder; " \
           f"lock = lock_folder({str(tmp_path)!r}); print('held', flush=True); sys.stdin.read()"  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        assert read_run(tmp_path).state == "running"
        os.utime(tmp_path / "log.txt", (time.time() - 3600,) * 2)
        assert read_run(tmp_path).state == "stale"
        with pytest.raises(UserError, match="another run"):
            lock_folder(tmp_path)  # asking has not taken it away
    finally:
        holder.communicate(timeout=60)
    assert read_run(tmp_path).state == "stale" and "killed" in read_run(tmp_path).why


def test_the_headline_says_what_collapsed_and_since_when(tmp_path):
    few = {"batch_perplexity": 3.0}
    before = [line(step) for step in range(10, 60, 10)]
    run = read_run(write_run(tmp_path / "a", [*before, *(line(step, **few) for step in range(60, 101, 10))]))
    assert headline(run)[0] == "bad" and "Since step 60" in headline(run)[1] and "cluster collapse" in headline(run)[1]
    recovered = [*before, line(60, **few), line(70)]
    run = read_run(write_run(tmp_path / "b", recovered))
    assert headline(run)[0] == "good" and "cluster at steps 60 to 60" in headline(run)[1]
    warming_up = [line(10, **few), *(line(step) for step in range(20, 60, 10))]
    run = read_run(
        write_run(tmp_path / "c", warming_up, results={"collapse": [{"checkpoint": "a", "verdict": "none"}]})
    )
    assert headline(run)[0] == "good" and "eval_collapse.py" in headline(run)[1] and not run.warnings
    run = read_run(
        write_run(tmp_path / "d", before, results={"collapse": [{"checkpoint": "a", "verdict": "dimensional"}]})
    )
    assert headline(run)[0] == "bad" and "dimensional" in headline(run)[1]


def test_pictures_of_the_run_s_own_weights_stand_before_those_of_baselines(tmp_path):
    write_run(tmp_path, [line(50)])
    for name in ("gallery_raw_pixels", "gallery_random_weights", "gallery_runs_z_checkpoint"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    page = report_page([read_run(tmp_path)])
    found = re.findall(r"<figcaption>gallery_(\w+)", page)
    assert found == ["runs_z_checkpoint", "random_weights", "raw_pixels"]


def test_marks_on_the_curves_are_explained_where_there_are_any(tmp_path):
    few = {"batch_perplexity": 3.0}
    lines = [*(line(step) for step in range(10, 60, 10)), line(60, **few)]
    plain = report_page([read_run(write_run(tmp_path / "a", lines[:-1], [start(0)]))])
    marked = report_page([read_run(write_run(tmp_path / "b", lines, [start(0), start(30)]))])
    assert 'class="key' not in plain
    assert 'class="key restart">vertical line' in marked and 'class="key warning">shaded' in marked


def test_a_run_that_failed_is_not_called_healthy(tmp_path):
    run = read_run(write_run(tmp_path, [line(50)], [start(0), end(51, "failed: step 51: loss is nan")]))
    assert headline(run)[0] == "bad" and headline(run)[1].startswith("The run failed after step 50. ")
    assert "step 51: loss is nan" in report_page([run])


def test_scores_of_seeds_are_one_line_with_mean_and_deviation(tmp_path):
    runs, names = [], ["a", "b", "c"]
    for seed, (top1, beta) in enumerate(((80.0, 0.5), (83.0, 0.5), (70.0, 1.0))):
        rows = [{"checkpoint": "raw pixels", "top1": 1.0}, {"checkpoint": "x.pth", "top1": top1}]
        args = {"objective": "cplearn", "beta": beta, "seed": seed, "output_dir": names[seed]}
        runs.append(read_run(write_run(tmp_path / names[seed], [line(10)], results={"knn": rows}, args=args)))
    assert score_of(runs[0], ("", "knn", None, "top1", "")) == 80.0
    told = scores(runs, names)
    assert "81.50 ± 2.12 (n = 2)" in told and "a, b" in told and "70.00" in told  # 3 / sqrt(2) = 2.12
    page = report_page(runs)
    assert re.search(r"--beta</th><td>0.5</td><td>0.5</td><td>1.0</td>", page)
    assert "--objective</th>" not in page.split("Flags that differ")[1].split("</section>")[0]
    weights = hashlib.sha256(b"backbone.w (4,) torch.float32" + np.arange(4, dtype=np.float32).tobytes()).hexdigest()
    assert weights[:16] in report_page(runs[:1])


def test_a_run_that_was_killed_and_stopped_tells_each_start_and_its_end(tmp_path):
    words = flags(write_pictures(tmp_path / "pictures"), tmp_path / "run", epochs=2)
    assert launch(words, tmp_path, faults={0: partial(kill_at, 7)}).wait() == [-signal.SIGKILL]
    job = launch(words, tmp_path)
    job.wait_for("step 12/")
    job.signal(signal.SIGUSR2)
    assert job.wait() == [128 + signal.SIGUSR2]
    assert read_run(tmp_path / "run").state == "stopped"
    assert launch(words, tmp_path).wait() == [0]
    run = read_run(tmp_path / "run")
    ends = [start.get("end", {}).get("how") for start in run.starts]
    assert ends == [None, f"stopped by signal {int(signal.SIGUSR2)}", "finished"] and run.state == "finished"
    assert run.starts[1]["step"] == 7 and run.step == run.total_steps == 24
    assert run.starts[0]["flags"]["epochs"] == [2, 100] and "seed" not in run.starts[0]["flags"]
    assert report_page([run]).count('"kind":"restart"') >= 2


# ---- the page --------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.found, self.scripts, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self.found.append((f"/{tag}", {}))

    def handle_data(self, text):
        self.text += text
        if self.found and self.found[-1][0] == "script":
            self.scripts.append((self.found[-1][1].get("type"), text))


def hostile_run(root):
    rows = [{"checkpoint": HOSTILE, "top1": 1.0, "per_class": {HOSTILE: 1.0}}]
    args = {"objective": "cplearn", "arch": HOSTILE, HOSTILE: HOSTILE}
    starts = [start(0, commit=HOSTILE, command=[HOSTILE], host=HOSTILE), end(10, f"failed: {HOSTILE}")]
    write_run(root, [line(10), line(20)], starts, {"knn": rows}, args)
    (root / "results_knn.md").write_text(f"| {HOSTILE} |\n|---|\n| {HOSTILE} |\n\n{HOSTILE}\n")
    (root / "results_collapse.json").write_text(
        json.dumps({"rows": [], "curves": {HOSTILE: {"spectrum": [3.0, 2.0, 1.0]}}})
    )
    Image.new("RGB", (40, 20)).save(root / "views.png")
    (root / "confusion_<b>.png").write_bytes(b"no picture")
    return root


def test_what_runs_left_is_text_and_the_only_script_is_ours(tmp_path):
    page = report_page([read_run(hostile_run(tmp_path / "<b>run"))])
    tags = Tags(page)
    names = [tag for tag, _ in tags.found]
    assert names.count("img") == 1 and "b>" not in "".join(names)
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    code = [text for kind, text in tags.scripts if kind is None]
    assert code == [(ROOT / "report" / "charts.js").read_text()]
    allowed = b64encode(hashlib.sha256(code[0].encode()).digest()).decode()
    policy = next(
        a["content"] for tag, a in tags.found if tag == "meta" and "content" in a and "default-src" in a["content"]
    )
    assert f"script-src 'sha256-{allowed}'" in policy and "default-src 'none'" in policy
    for kind, text in tags.scripts:
        if kind == "application/json":
            json.loads(text)
    outside = [
        value
        for _, a in tags.found
        for key, value in a.items()
        if key in ("src", "href") and not value.startswith("data:")
    ]
    assert not outside and "alert(1)" in tags.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "log.txt").write_bytes(b"\x00" * 1000),
        lambda root: (root / "log.txt").unlink(),
        lambda root: (root / "starts.txt").write_text('{"kind": "end"}\n{"kind": "start", "step": null}\nnull\n'),
        lambda root: (root / "checkpoint.pth").write_bytes(b"PK\x03\x04 cut off"),
        lambda root: torch.save({"args": 3}, root / "checkpoint.pth"),
        lambda root: (root / "results_knn.json").write_text('{"rows": 3}'),
        lambda root: (root / "results_knn.json").write_text('{"rows": [{"top1": "x", "per_class": 3}]}'),
        lambda root: (root / "results_knn.md").unlink(),
        lambda root: (root / "results_collapse.json").write_text('{"rows": [{"verdict": 3}], "curves": {"a": [3]}}'),
        lambda root: (root / "views.png").write_bytes(b""),
        lambda root: (root / "log.txt").write_text(json.dumps({"kind": "step", "step": 1}) + "\n"),
        lambda root: (root / "log.txt").write_text(json.dumps(line(10, num_codes="x", spread=None)) + "\n"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_a_page_that_says_what_is_missing(tmp_path, damage):
    hostile_run(tmp_path)
    damage(tmp_path)
    run = read_run(tmp_path)
    assert report_page([run]) and report_page([run, run])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, which .ci/run installs")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_draws_every_chart_and_asks_nothing_of_anyone(tmp_path, theme):
    lines = [line(step, **({"batch_perplexity": 2.0} if step > 300 else {})) for step in range(10, 501, 10)]
    starts = [start(0), end(100, "stopped by signal 12"), start(100)]
    one = read_run(write_run(hostile_run(tmp_path / "one"), lines, starts))
    for name, runs in (("one", [one]), ("two", [one, read_run(write_run(tmp_path / "two", lines[:20]))])):
        page = tmp_path / f"{name}.html"
        page.write_text(report_page(runs))
        drawn, said, asked = browse(page, theme)
        charts = re.findall(r'<figure class="chart">.*?</figure>', drawn, re.DOTALL)
        assert len(charts) >= 8 and all("<polyline" in chart and "NaN" not in chart for chart in charts)
        assert not said and not asked, (said, asked)
        assert 'class="drawn"' in drawn and (
            name == "two" or ('class="warning"' in drawn and 'class="restart"' in drawn)
        )


def browse(page, theme):
    """(the document after its script, what its console said, addresses other than the page that it asked for)."""
    log = page.with_suffix(".netlog")
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    words += [f"--log-net-log={log}", f"--user-data-dir={page.parent / 'browser'}", *dark, "--dump-dom", page.as_uri()]
    done = subprocess.run([CHROMIUM, *words], capture_output=True, text=True, timeout=120)
    said = [text for text in done.stderr.splitlines() if "CONSOLE" in text]
    asked = set(re.findall(r'"url":"((?:https?|file):[^"]*)"', log.read_text(errors="replace")))
    own = {address for address in asked if "google" in address or "chrome" in address}  # the browser's own errands
    return done.stdout, said, asked - own - {page.as_uri()}


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_folder_of_runs_is_listed_and_bad_input_is_one_line(tmp_path, capsys):
    write_run(tmp_path / "runs" / "a", [line(100)], [start(0), end(100, "finished")])
    write_run(tmp_path / "runs" / "b" / "c", [line(50)], [start(0)], {"knn": [{"checkpoint": "x", "top1": 81.25}]})
    make_report.main([str(tmp_path / "runs")])
    told = capsys.readouterr().out.splitlines()
    assert re.search(r"runs/a +\| finished \| 100 of 100", told[2]) and re.search(
        r"b/c +\| stale .*\| +81.25 \|", told[3]
    )
    (tmp_path / "empty").mkdir()
    run = str(tmp_path / "runs" / "a")
    no_folder = ["--output", f"{run}/log.txt/x.html"]
    for words in ([str(tmp_path / "none")], [str(tmp_path / "empty")], [run, run], [run, *no_folder]):
        with pytest.raises(SystemExit) as ended:
            make_report.main(words)
        assert ended.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_watch_writes_the_page_until_the_run_has_ended(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, [line(50)], [start(0)])
    states = iter(["running", "running", "finished"])
    monkeypatch.setattr(folders, "state_of", lambda run: (next(states), ""))
    pages = []
    monkeypatch.setattr(make_report.time, "sleep", lambda _: pages.append((tmp_path / "report.html").read_text()))
    make_report.main([str(tmp_path), "--watch", "--every_s", "7"])
    assert len(pages) == 2 and all('http-equiv="refresh" content="7"' in page for page in pages)
    assert 'http-equiv="refresh"' not in (tmp_path / "report.html").read_text()
    assert len(capsys.readouterr().out.splitlines()) == 3
