"""What the tests of hostile files share: a judge that outlives what it judges, and ways to damage bytes.

survey(function, cases)       function(case) for each case, in a child process: the verdict on each
drawn(cases, most)            some of the cases
mutants(content, ...)         (name, damaged content): bits flipped, cut short, zeroed, doubled, ...
"""

import contextlib
import faulthandler
import io
import multiprocessing
import os
import pickle
import random
import resource
import signal
import sys
import tarfile
import time
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path

from utils import UserError

SECONDS_PER_CASE = 60  # a loader needs a tenth of one; a busy host may need many
MOST_MEMORY_MB = 800  # growth of the resident set in one case
MOST_ADDRESSES_MB = 6000  # growth of the address space: more is refused by the kernel, and the host is not drowned
RUBBISH = (b"", b"\0", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02}.", b"<html></html>", b"\xff" * 5000)
LONGEST_LINE = 700  # characters of a refusal, the path in it included


@dataclass
class Verdict:
    """What became of a case. outcome: worked, refused (a UserError) or failed; text: its result, line or traceback."""

    case: object
    outcome: str
    text: str
    memory_mb: float = 0.0  # by which the peak resident set was above the start
    seconds: float = 0.0

    def fault(self, most_memory_mb=MOST_MEMORY_MB):
        """What is wrong with it, or None."""
        if self.outcome == "failed":
            return self.text
        if self.outcome == "refused" and (not self.text.isprintable() or not 0 < len(self.text) <= LONGEST_LINE):
            return (
                f"not one printable line of at most {LONGEST_LINE} characters ({len(self.text)}): {self.text[:900]!r}"
            )
        return f"took {self.memory_mb:.0f} MB" if self.memory_mb > most_memory_mb else None


def survey(function, cases, *, seconds=SECONDS_PER_CASE):
    """A Verdict on function(case) for each case. Both must be picklable; a result is shown by str().

    All run in one child process, and in the next one from the case after that which killed it."""
    cases, verdicts = list(cases), []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "main_cplearn"])  # imported once, not once per process
    while len(verdicts) < len(cases):
        ours, theirs = context.Pipe(duplex=False)
        todo = cases[len(verdicts) :]
        child = context.Process(target=judge, args=(function, todo, theirs, seconds))
        child.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            while len(verdicts) < len(cases):
                verdicts.append(Verdict(cases[len(verdicts)], *ours.recv()))
        child.join(timeout=60)
        if len(verdicts) < len(cases):
            verdicts.append(Verdict(cases[len(verdicts)], "failed", f"the process ended: exit code {child.exitcode}"))
    return verdicts


def judge(function, cases, results, seconds):
    """In the child: call, watch time and memory, and send what came of it."""
    faulthandler.enable()
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    addresses = (status_mb("VmSize") + MOST_ADDRESSES_MB) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (int(addresses), resource.RLIM_INFINITY))
    for case in cases:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        signal.alarm(seconds)  # ends the process, whatever C code it is in: seen as exit code -14
        start, before = time.monotonic(), status_mb("VmRSS")
        outcome = call(function, case)
        signal.alarm(0)
        results.send((*outcome, status_mb("VmHWM") - before, time.monotonic() - start))


def call(function, case):
    try:
        return "worked", str(function(case))
    except UserError as error:
        return "refused", str(error)
    except BaseException:
        return "failed", traceback.format_exc()


def status_mb(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024  # the kernel says kB


def assert_no_faults(verdicts, most_memory_mb=MOST_MEMORY_MB):
    found = [(verdict.case, verdict.fault(most_memory_mb)) for verdict in verdicts]
    faults = [f"--- {case}: {fault[-1500:]}" for case, fault in found if fault]
    assert not faults, f"{len(faults)} of {len(verdicts)} cases:\n" + "\n".join(faults[:30])


def drawn(cases, most, seed=""):
    """So many of the cases, always the same ones; all of them where they are fewer."""
    cases = sorted(cases)
    return random.Random(seed).sample(cases, min(most, len(cases)))


# ---- damage ----------------------------------------------------------------------------------------------------------


def mutants(content, count, seed, regions=((0.0, 1.0),)):
    """(name, damaged content), `count` of them; regions: shares of the content, in turn, in which the damage lies."""
    for number in range(count):
        draws = random.Random(f"{seed} {number}")
        damage = DAMAGES[number % len(DAMAGES)]
        first, last = regions[number // len(DAMAGES) % len(regions)]
        start = draws.randrange(int(first * len(content)), max(1, int(last * len(content))))
        yield f"{number} {damage.__name__} at {start}", bytes(damage(bytearray(content), start, draws))


def flip_bits(content, start, draws):
    for _ in range(draws.choice((1, 4, 32))):
        place = min(len(content) - 1, start + draws.randrange(64))
        content[place] ^= 1 << draws.randrange(8)
    return content


def cut_short(content, start, draws):
    return content[:start]


def zero_block(content, start, draws):
    size = min(draws.choice((4, 64, 4096)), len(content) - start)
    content[start : start + size] = bytes(size)
    return content


def double_block(content, start, draws):
    size = draws.choice((4, 64, 4096))
    return content[: start + size] + content[start : start + size] + content[start + size :]


def drop_block(content, start, draws):
    return content[:start] + content[start + draws.choice((1, 64, 4096)) :]


def random_block(content, start, draws):
    size = min(draws.choice((4, 64, 1024)), len(content) - start)
    content[start : start + size] = draws.randbytes(size)
    return content


def extreme_bytes(content, start, draws):
    """Where a length or a size stands, the largest one."""
    size = min(draws.choice((2, 4, 8)), len(content) - start)
    content[start : start + size] = draws.choice((b"\xff", b"\x7f", b"\x80"))[:1] * size
    return content


DAMAGES = (flip_bits, cut_short, zero_block, double_block, drop_block, random_block, extreme_bytes)


def canary_command(canary):
    """A shell command that leaves the file `canary` behind: where it exists, a file's code was run."""
    return f"touch '{os.fspath(canary)}'"


# ---- files in which a pickle may be ---------------------------------------------------------------------------------


def zipped(base, data_pkl, **replaced):
    """The zip file `base` with another data.pkl; replaced: {end of a member's name: content}."""
    written, replaced = io.BytesIO(), {"data.pkl": data_pkl} | replaced
    with zipfile.ZipFile(io.BytesIO(base)) as old, zipfile.ZipFile(written, "w") as new:
        for name in old.namelist():
            content = next((value for end, value in replaced.items() if name.endswith(end)), None)
            new.writestr(name, old.read(name) if content is None else content)
    return written.getvalue()


def legacy(content, magic=0x1950A86A20F9469CFC6C, system=None, keys=()):
    """As torch before 1.6 wrote it: five pickles in a row."""
    system = system or {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2}}
    return b"".join(pickle.dumps(part, protocol=2) for part in (magic, 1001, system, content, list(keys)))


def tarred(content):
    """As torch before 0.2 wrote it."""
    written, part = io.BytesIO(), pickle.dumps(content, protocol=2)
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    return written.getvalue()
