"""Store the examples, rules and effects of every neuron of a study's runs, and write pages about them.

    soluscope neurons runs/first
    soluscope neurons runs/first/solu_ln-s0 n_tokens=200000
    soluscope neurons solu-1l data=stdlib
    soluscope neurons runs/first --serve

Arguments are a folder or a pretrained model's name, and settings as key=value. For each run, its model and its
initialisation are read. The results are in the run's folder neurons/, and the pages in the study's. The same
command resumes an interrupted one. With --serve nothing is computed: a page on this machine shows the stored
neurons, and a neuron on any text that you type.
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser
from soluscope.config import EditorConfig, NeuronsConfig, PretrainedNeuronsConfig, load_typed
from soluscope.config_help import neurons_help
from soluscope.errors import UserError
from soluscope.terminal import answer, say


def build_parser() -> Parser:
    """Return the parser of `soluscope neurons`."""
    parser = Parser(__doc__, neurons_help)
    parser.add_argument("folder", help="a study, a run, or a pretrained model's name")
    parser.add_argument("words", nargs="*", default=[], help="key=value")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument(
        "--serve", action="store_true", help="show stored neurons on any text, in a local page"
    )
    actions.add_argument(
        "--neuronpedia",
        type=Path,
        metavar="DIR",
        help="write stored neurons as Neuronpedia's files, and stop",
    )
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope neurons`."""
    options = build_parser().parse_intermixed_args(arguments)
    folder = Path(options.folder)
    if options.serve:
        editor = load_typed(EditorConfig, options.words)
        from soluscope.editor.serve import serve

        serve(folder, editor)
        return
    if options.neuronpedia:
        if options.words:
            raise UserError(f"{options.words[0]}: --neuronpedia has no settings, so omit it")
        from soluscope.neurons.neuronpedia import export

        export(folder, options.neuronpedia)
        answer(f"neurons: {options.neuronpedia}")
        return
    is_study = folder.is_dir() and not (folder / "config.json").is_file()
    schema = NeuronsConfig if is_study else PretrainedNeuronsConfig
    config = load_typed(schema, options.words)
    if not folder.is_dir() and len(folder.parts) > 1 and folder.parent.is_dir():
        raise UserError(f"no folder {folder}: name a study or a run, as in runs/demo")
    # Imported late, so that --help and mistakes are answered at once.
    from soluscope.neurons.compute import compute, compute_pretrained
    from soluscope.neurons.site import build

    if isinstance(config, PretrainedNeuronsConfig):
        runs = compute_pretrained(options.folder, config, say)
    else:
        runs = compute(folder, config, say)
    answer(f"neurons: {build(runs[0].dir.parent)}")


COMMAND = Command(build_parser, run)
