"""Remove the per-token gain, or all LayerNorms, of a study's trained models, and measure what this costs.

    soluscope remove runs/first
    soluscope remove runs/demo/solu_ln-s0 n_fit_tokens=50000
    soluscope remove runs/demo norms=all

Arguments are a folder, settings as key=value, and YAML files of settings. The steps are: one gain for all tokens
(Phi_inf), a readout that is fitted again (Phi_ro), and further training (Phi_ft). If norms=all is set, further
training replaces the per-token scales of all norms by constants. The same command resumes an interrupted removal.
The report shows the results in a separate section.
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser
from soluscope.config import RemoveConfig, load_typed
from soluscope.config_help import help_lines
from soluscope.errors import UserError
from soluscope.terminal import answer, say


def build_parser() -> Parser:
    """Return the parser of `soluscope remove`."""
    parser = Parser(__doc__, lambda: "\n".join(help_lines(RemoveConfig)))
    parser.add_argument("folder", type=Path, help="folder of a study or a run")
    parser.add_argument("words", nargs="*", default=[], help="key=value, or a YAML file")
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope remove`."""
    options = build_parser().parse_intermixed_args(arguments)
    config = load_typed(RemoveConfig, options.words)
    if not options.folder.is_dir():
        raise UserError(f"no folder {options.folder}: name a study or a run, as in runs/demo")
    # Imported late, so that mistakes are answered at once.
    from soluscope.evaluation.removing import remove

    path = remove(options.folder, config, say)
    answer(f"{path} is written; 'soluscope report {path.parent}' makes the report")


COMMAND = Command(build_parser, run)
