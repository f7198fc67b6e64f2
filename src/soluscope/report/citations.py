"""References of the methods paragraph: their short texts, and the entries of references.bib."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

OWN = "soluscope"
"""Key of soluscope's entry, whose version and commits come from the records."""
TITLE = "soluscope: what does LayerNorm do in SoLU language models?"
AUTHORS = "The soluscope developers"
SHORT = {
    OWN: "soluscope",
    "elhage2022solu": "Elhage et al. 2022",
    "ba2016layernorm": "Ba et al. 2016",
    "loshchilov2019adamw": "Loshchilov and Hutter 2019",
    "nanda2022transformerlens": "Nanda and Bloom 2022",
    "paszke2019pytorch": "Paszke et al. 2019",
    "efron1993bootstrap": "Efron and Tibshirani 1993",
    "holm1979": "Holm 1979",
    "schuirmann1987": "Schuirmann 1987",
}
"""Texts that cite a reference, by its key."""


@cache
def entries() -> dict[str, str]:
    """Return the entries of references.bib by their keys."""
    text = (Path(__file__).parent / "references.bib").read_text(encoding="utf8")
    found = (re.match(r"@\w+\{(\w+),", entry) for entry in text.split("\n\n"))
    return {match[1]: match.string.strip() for match in found if match}


def bibtex(keys: Iterable[str], version: str = "", commits: Iterable[str] = ()) -> str:
    """Return BibTeX entries of soluscope and of the references.

    Args:
        keys: keys of the references.
        version: version of soluscope; empty if it is unknown.
        commits: commits of soluscope's code.
    """
    others = [entries()[key] for key in dict.fromkeys(keys) if key != OWN]
    return "\n\n".join([_own(version, commits), *others, ""]).rstrip("\n") + "\n"


def _own(version: str, commits: Iterable[str]) -> str:
    """Return the entry of soluscope. A version or commit with characters that BibTeX interprets is left out."""
    known = [f"version {version}"] if re.fullmatch(r"[\w.+, -]+", version) else []
    named = [each for each in commits if re.fullmatch(r"[\w.+-]+", each)]
    known += [f"commit {', '.join(named)}"] if named else []
    title = TITLE.replace("LayerNorm", "{LayerNorm}").replace("SoLU", "{SoLU}")
    lines = [
        f"@misc{{{OWN},",
        f"  title = {{{{{OWN}}}{title.removeprefix(OWN)}}},",
        f"  author = {{{{{AUTHORS}}}}},",
        "  howpublished = {Software},",
        *([f"  note = {{{'; '.join(known)}}},"] if known else []),
        "}",
    ]
    return "\n".join(lines)
