"""What of a run is said in words."""

BASELINES = ("raw pixels", "random weights")  # evaluated beside the run's own weights by --baselines


def headline(run):
    """("good", "bad" or "unknown", a sentence about the run's health)."""
    kind, sentence = health(run)
    return ("bad", f"The run failed after step {run.step:,}. {sentence}") if run.state == "failed" else (kind, sentence)


def health(run):
    """The same, of its curves and of eval_collapse.py's verdict alone."""
    steps = run.steps.get("step", ())
    if not len(steps):
        return "unknown", "Nothing has been logged yet."
    last = int(steps[-1])
    now = [warned for warned in run.warnings if warned.last == last]
    if now:
        return "bad", " ".join(f"Since step {w.first:,} it looks like {w.sentence}." for w in now)
    found = judged(run)
    if found:
        return "bad", f"The curves look healthy, and eval_collapse.py found collapse: {found}."
    checked = " by eval_collapse.py too" if found == "" else ""
    past = "; ".join(f"{w.kind} at steps {w.first:,} to {w.last:,}" for w in run.warnings)
    if past:
        return "good", f"Healthy now{checked}. Earlier lines looked like a collapse: {past}."
    nor = ", nor do the features by eval_collapse.py" if checked else ""
    return "good", f"Healthy: none of {len(steps):,} logged lines looks like a collapse{nor}."


def judged(run):
    """What eval_collapse.py found of the trained model: "" for none, None where it has not been run."""
    for row in run.results.get("collapse", {}).get("rows", []):
        if row.get("checkpoint") not in BASELINES and isinstance(row.get("verdict"), str):
            return "" if row["verdict"] == "none" else row["verdict"]
    return None


def plain(value):
    return list(value) if isinstance(value, tuple) else value
