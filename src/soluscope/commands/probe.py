"""Probe the finished runs of a study, one run, or a pretrained model.

    soluscope probe runs/demo probes=[engagement,scale_freeze] n_tokens=2000
    soluscope probe solu-1l data=stdlib study=runs/demo
    soluscope probe --controls
    soluscope probe --false-positives runs/demo

Arguments are a folder or a pretrained model's name, settings as key=value, and YAML files of settings.
The same command resumes an interrupted evaluation.
A pretrained model belongs to the SoLU family. Give a name that TransformerLens knows (solu-1l, gelu-1l,
solu-2l, …), owner/name on the Hugging Face hub, or a folder with config.json. Its study is runs/<name>,
and its report is written at the end.
"""

from __future__ import annotations

from pathlib import Path

from soluscope.commands import Command, Parser
from soluscope.config import YAML, EvalConfig, PretrainedConfig, load_evaluation, to_yaml
from soluscope.config_help import eval_help
from soluscope.errors import UserError
from soluscope.reading import is_path
from soluscope.terminal import answer, say


def build_parser() -> Parser:
    """Return the parser of `soluscope probe`."""
    parser = Parser(__doc__, eval_help)
    parser.add_argument(
        "words", nargs="*", help="a folder or a pretrained model's name, key=value, or a YAML file"
    )
    calibrations = parser.add_mutually_exclusive_group()
    calibrations.add_argument(
        "--controls",
        dest="calibration",
        action="store_const",
        const="controls",
        help="run the probes on the planted models, whose answers are known, print which probes pass, and stop",
    )
    calibrations.add_argument(
        "--false-positives",
        dest="calibration",
        action="store_const",
        const="false-positives",
        help="count how often the probes' tests find an effect on untrained models and shuffled labels "
        "(one minute per probe), print the counts, store them for the folder's report, and stop",
    )
    parser.add_argument(
        "--cfg", action="store_true", help="print the merged configuration and stop"
    )
    return parser


def run(arguments: list[str]) -> None:
    """Run `soluscope probe`."""
    options = build_parser().parse_intermixed_args(arguments)
    named = [word for word in options.words if is_path(word) and not word.endswith(YAML)]
    folder = Path(named[0]) if named else None
    # A trained run's folder holds config.yaml; a repository of the hub holds config.json.
    is_study = folder is None or (folder.is_dir() and not (folder / "config.json").is_file())
    schema = EvalConfig if is_study or options.calibration else PretrainedConfig
    config = load_evaluation(schema, [word for word in options.words if word not in named])
    if options.cfg:
        answer(*to_yaml(config).rstrip("\n").split("\n"))
        return
    if len(named) > 1 or not (named or options.calibration):
        build_parser().error(
            f"{len(named)} folders given, wanted one, as in: soluscope probe runs/demo"
        )
    # Where a folder runs/ exists, runs/dmeo is a typing error and not a repository of the owner `runs`.
    is_in_folder = folder is not None and len(folder.parts) > 1 and folder.parent.is_dir()
    if folder and not folder.is_dir() and (is_in_folder or options.calibration):
        raise UserError(f"no folder {folder}: name a study or a run, as in runs/demo")
    # Imported late, so that mistakes are answered at once.
    from soluscope.evaluation.suite import calibrate, evaluate, evaluate_pretrained

    if options.calibration:
        calibrate(options.calibration, config, folder, say)
    elif isinstance(config, PretrainedConfig):
        path = evaluate_pretrained(named[0], config, say)
        answer(f"report: {path}")
    elif folder:
        path = evaluate(folder, config, say)
        answer(f"{path} is written; 'soluscope report {path.parent}' makes the report")


COMMAND = Command(build_parser, run)
