"""Count docstrings that start with a verb, and phrases that the style forbids.

    python tests/plain_english.py                        # every file that people read
    python tests/plain_english.py src/soluscope/probes   # one folder, or files

Prints each offending line, then the counts. Read are docstrings, comments and messages of Python files, the
prose of Markdown files and of notebooks (code left out), comments of YAML files, and the text of the report's
templates. In a notebook, lines are counted from the top of a cell.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "src", "train", "eval", "sweeps", "configs", "benchmarks", "tests", "docs", "README.md",
    "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md",
)  # fmt: skip
OWN = {"plain_english.py", "test_plain_english.py"}
"""Files that quote the phrases."""
SUFFIXES = {".py", ".md", ".ipynb", ".yaml", ".j2"}

# Pattern -> what to write. Matched within one sentence, ignoring case.
PHRASES = {
    r"\banew\b|\bmade again\b": "again, recompute",
    r"\bof (each|every|a) (token|neuron|model|document)'?s? own\b|\btoken's own\b": "per-token",
    r"\bof (its|their|his) own\b": "separate, its own X",
    r"\bnone if (none|no other|there is none)\b": "None if no value does",
    r"\bbinds?\b (nobody|no|it|them)\b": "may be overwritten",
    r"\b(file|folder|number|record|row|report|page|probe|model|value)s? (speaks?|tells?|knows?|wants?|asks? for)\b":
        "software is not a person: contains, shows, needs",
    r"\b(is|are|was|were|be|being) told\b": "receives, is given, is set to",
    r"\bhas it\b|\bhave it\b": "name the thing",
    r"\bturn(s|ed|ing)? (it |them )?up\b": "amplify",
    r"\boff (0|zero)\b": "nonzero",
    r"\bput before\b": "validate on",
    r"\b(rules?|ruled) out no\b": "does not rule out",
    r"\btells? (apart|them|it|how|whether|which)\b|\btell (a|an|the) \w+ from\b": "distinguish, show",
    r"\b(its|their|lower|upper|both|two|interval's|interval) ends?\b(?! (up|in|on|with|by)\b)": "bounds",
    r"\b(of|with|from|by|for|on|in|to|than|as|at|after|and|or|is|not|says|see|so|all) what\b":
        "name the thing instead of 'what ...'",
    r"^(what|whether|who|whoever|whatever|which)\b[^?]*$": "subject, verb, object: name the thing",
    r"\ball that\b|\bthose (that|in|with|which)\b|\bthat which\b":
        "repeat the noun",
    r"\b(one|others|none) if\b": "say it in a full clause",
    r"\bless (what|the|its|that|those|their|a)\b": "minus",
    r"\bwhere (it|they) (lies?|stands?)\b": "its path",
    r"\bcannot be said\b|\b(is|be|was) said\b|\bsays nothing\b": "cannot be measured, is not reported",
    r"\bgo(es)? on\b|\bwent on\b|\bgoing on\b|\bgone on\b": "continue, resume",
    r"\b(hold|holds|held) (it |them |the \w+ |that \w+ )?to\b": "check against",
    r"\btakes? (a|the|no) (scale|gain)\b": "needs",
    r"\b(do|does|did) without\b": "omit, not need",
    r"\bas it was asked\b|\bas asked for\b": "as requested",
    r"\bby (the|its|their) (hand|side)\b": "manually, beside",
    r"\bput by\b|\bgiven up on\b": "plain verb",
    r"\b(nats|one|ms|seconds?|minutes?|value|line|row|draws|hours?|job|figure) an? "
    r"(token|probe|step|run|neuron|document|row|line|model|seed|pair)\b": "per token, per step",
    r"\bto the letter\b|\bat all events\b|\bupon which\b|\bthereof\b|\bwherein\b": "plain words",
}  # fmt: skip
COMPILED = [(re.compile(pattern, re.IGNORECASE), advice) for pattern, advice in PHRASES.items()]

# First words of the docstrings of functions. A new verb goes into the file.
VERBS = frozenset((ROOT / "tests" / "verbs.txt").read_text(encoding="utf8").split())


class Text(NamedTuple):
    """A piece of text that people read, at a line of a file."""

    path: Path
    line: int
    text: str


class Offence(NamedTuple):
    """A sentence with a forbidden phrase, and advice."""

    path: Path
    line: int
    sentence: str
    phrase: str
    advice: str


def files(names: list[str] | None = None) -> list[Path]:
    """Return the files to read, sorted; those under `names`, or all that people read."""
    roots = [Path(name).resolve() for name in names] if names else [ROOT / f for f in FOLDERS]
    found = set()
    for root in roots:
        found |= {p for p in root.rglob("*") if p.suffix in SUFFIXES} if root.is_dir() else {root}
    return sorted(p for p in found if p.is_file() and p.name not in OWN)


def docstrings(path: Path) -> Iterator[Text]:
    """Yield the docstrings of a Python file's functions, tests and nested functions left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and not node.name.startswith("test_"):
                yield Text(path, node.lineno, text)


def texts(path: Path) -> Iterator[Text]:
    """Yield the pieces of text of a file that people read."""
    source = path.read_text(encoding="utf8")
    if path.suffix == ".py":
        yield from _python(path, source)
    elif path.suffix == ".md":
        yield from _markdown(path, source)
    elif path.suffix == ".ipynb":
        for cell in json.loads(source)["cells"]:
            if cell["cell_type"] == "markdown":
                yield from _markdown(path, "".join(cell["source"]))
    elif path.suffix == ".j2":
        yield from _paragraphs(
            path, re.sub(r"\{[{%#].*?[}%#]\}|<[^>]*>", _blank, source, flags=re.DOTALL)
        )
    else:
        yield from _comments(path, [(n, m[1]) for n, m in _matches(r"#(.*)$", source)])


def _markdown(path: Path, source: str) -> Iterator[Text]:
    code = r"```.*?```|^    .*?$|`[^`\n]+`"
    yield from _paragraphs(path, re.sub(code, _blank, source, flags=re.DOTALL | re.MULTILINE))


def _python(path: Path, source: str) -> Iterator[Text]:
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and len(node.value.split()) > 2:
            for paragraph in _paragraphs(path, node.value):
                yield paragraph._replace(line=node.lineno + paragraph.line - 1)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [(t.start[0], t.string.lstrip("#: ")) for t in tokens if t.type == tokenize.COMMENT]
    yield from _comments(path, comments)


def _comments(path: Path, lines: list[tuple[int, str]]) -> Iterator[Text]:
    """Yield comments, those on consecutive lines joined."""
    start, last, joined = 0, -1, ""
    for number, text in lines:
        if number == last + 1:
            joined = f"{joined} {text}"
        else:
            if joined:
                yield Text(path, start, joined)
            start, joined = number, text
        last = number
    if joined:
        yield Text(path, start, joined)


def _paragraphs(path: Path, text: str) -> Iterator[Text]:
    line = 1
    for part in re.split(r"(\n\s*\n|\n(?=\s*[-|]))", text):
        if part.strip():
            yield Text(path, line + len(part) - len(part.lstrip("\n")), " ".join(part.split()))
        line += part.count("\n")


def _matches(pattern: str, source: str) -> Iterator[tuple[int, re.Match[str]]]:
    for number, line in enumerate(source.splitlines(), 1):
        match = re.search(pattern, line)
        if match:
            yield number, match


def _blank(match: re.Match[str]) -> str:
    """Return a placeholder with as many line ends as the match has."""
    return "x" + "\n" * match[0].count("\n")


def offences(path: Path) -> list[Offence]:
    """Return the sentences of a file that use a forbidden phrase."""
    found = []
    for text in texts(path):
        for sentence in re.split(r"(?<=[.!?:;])\s+", text.text):
            for pattern, advice in COMPILED:
                match = pattern.search(sentence.strip(" -*|"))
                if match:
                    found.append(Offence(path, text.line, sentence, match[0][:40], advice))
    return found


def starts_with_a_verb(text: str) -> bool:
    """Return whether the first word of a docstring is one of VERBS."""
    return text.split()[0].strip(":,.;").lower() in VERBS


def main(names: list[str]) -> None:
    """Print the offences and the counts."""
    selected = files(names)
    found = [offence for path in selected for offence in offences(path)]
    functions = [text for path in selected if path.suffix == ".py" for text in docstrings(path)]
    others = [text for text in functions if not starts_with_a_verb(text.text)]
    for offence in found:
        where = f"{offence.path.relative_to(ROOT)}:{offence.line}"
        print(f"{where}: [{offence.phrase}] {offence.sentence[:150]}  -> {offence.advice}")
    for text in others:
        print(
            f"{text.path.relative_to(ROOT)}:{text.line}: no verb first: {text.text.splitlines()[0]}"
        )
    print(f"{len(found)} forbidden phrases in {len(selected)} files")
    if functions:
        share = 1 - len(others) / len(functions)
        print(
            f"{len(functions) - len(others)} of {len(functions)} docstrings start with a verb ({share:.0%})"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
