"""The commands that README.md, docs/ and the scripts' docstrings print: where they stand, and what each of them is."""

import ast
import importlib
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "benchmarks" / "README.md"]
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
STARTS = re.compile(r"(?:[A-Z_]+=\S+ +)*(?:python|torchrun|make|pytest)(?: |$)")
SOURCE = re.compile(r"\. \S+; *")  # a file that the shell reads first
SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)*)`")


@dataclass
class Command:
    page: str  # the file it stands in
    text: str
    whole: bool  # in a block of its own; a mention in running text need not name all that is required
    variables: dict = field(default_factory=dict)  # of the environment
    launcher: list = field(default_factory=list)  # torchrun and its flags
    program: str = ""  # main_cplearn.py, benchmarks.head, make, pytest, -c
    words: list = field(default_factory=list)  # what the program is given

    def __str__(self):
        return f"{self.page}: {self.text}"


def commands(pages):
    """All commands of these files, each once."""
    found = {}
    for page in pages:
        for whole, lines in ((True, lines_of_blocks(text_of(page))), (False, lines_of_spans(text_of(page)))):
            for words in (words for line in lines for words in commands_of(line)):
                found.setdefault(tuple(words), parse(str(page.relative_to(ROOT)), words, whole))
    return list(found.values())


def text_of(page):
    """A page; of a script, its docstring."""
    text = page.read_text()
    return text if page.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""


def lines_of_blocks(text):
    """Command lines of indented and fenced blocks; one goes on after a backslash, and while a quote is open."""
    fenced, lines = False, iter(text.splitlines())
    for line in lines:
        if line.startswith("```"):
            fenced = not fenced
        inside = fenced or line.startswith("    ")
        if inside and STARTS.match(SOURCE.sub("", line.strip())):
            command = line.strip()
            while command.endswith("\\") or is_open(command):
                command = command.removesuffix("\\") + "\n"[: is_open(command)] + next(lines).strip()
            yield command


def lines_of_spans(text):
    """Commands between backticks in running text, outside of blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    prose = "\n".join("" if line.startswith("    ") else line for line in prose.splitlines())
    for span in SPAN.findall(prose):
        command = " ".join(span.split())
        if STARTS.match(command) and " " in command:
            yield command


def is_open(command):
    try:
        shlex.split(command, comments=True)
    except ValueError as error:
        return "quotation" in str(error)
    return False


def commands_of(line):
    """Words of each command of a line: `a; b`, `a && b`, `a &`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, "#"
    part = []
    for word in [*lexer, ";"]:
        if set(word) <= set(";&|"):
            if part and STARTS.match(shlex.join(part).replace("'", "")):
                yield part
            part = []
        else:
            part.append(word)


def parse(page, words, whole):
    command = Command(page, shlex.join(words), whole)
    rest = list(words)
    while re.fullmatch(r"[A-Z_]+=.*", rest[0]):
        name, _, value = rest.pop(0).partition("=")
        command.variables[name] = value
    first = rest.pop(0)
    if first == "torchrun":
        script = next((i for i, word in enumerate(rest) if word.endswith(".py")), len(rest))
        command.launcher, rest = [first, *rest[:script]], rest[script:]
    if not rest or first in ("make", "pytest"):
        command.program = first
    elif rest[0] == "-m":
        command.program, rest = rest[1], rest[2:]
    else:
        command.program, rest = rest[0], rest[1:]
    command.words = rest
    return command


def parser_of(program):
    """The argument parser of a script or a benchmark; None for what has none of ours."""
    name = program.removesuffix(".py").replace("/", ".")
    path = ROOT / (name.replace(".", "/") + ".py")
    source = path.read_text() if path.exists() else ""
    maker = next((maker for maker in ("get_args_parser", "get_parser") if f"def {maker}(" in source), None)
    return getattr(importlib.import_module(name), maker)() if maker else None
