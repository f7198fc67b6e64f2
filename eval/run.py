"""Probe trained models: every finished run below a folder, or one run; or a pretrained model.

    python eval/run.py runs/demo probes=[engagement,scale_freeze] n_tokens=2000
    python eval/run.py solu-1l data=stdlib study=runs/demo
    python eval/run.py --controls
    python eval/run.py --false-positives runs/demo

Words are a folder, key=value, or YAML files. Goes on where an interrupted evaluation stopped.
A pretrained model is one of the SoLU family: a name of TransformerLens's (solu-1l, gelu-1l, solu-2l, …),
owner/name on the Hugging Face hub, or a folder with its config.json. Its study is runs/<name>, which can
be named from then on as any other; the report is made at once.
"""

import sys
from functools import partial
from pathlib import Path

from soluscope.command import Parser, run_command
from soluscope.config import EvalConfig, PretrainedConfig, load_typed, to_yaml
from soluscope.config_help import eval_help
from soluscope.errors import UserError


def main(arguments: list[str]) -> None:
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
        help="run the probes on the models with known answers, print which pass, and stop",
    )
    calibrations.add_argument(
        "--false-positives",
        dest="calibration",
        action="store_const",
        const="false-positives",
        help="count how often the probes' tests speak on untrained models and shuffled labels "
        "(a minute a probe), print it, keep it for the report of the folder, and stop",
    )
    parser.add_argument(
        "--cfg", action="store_true", help="print the merged configuration and stop"
    )
    given = parser.parse_intermixed_args(arguments)
    named = [
        word for word in given.words if "=" not in word and not word.endswith((".yaml", ".yml"))
    ]
    folder = Path(named[0]) if named else None
    # The folder of a trained run holds config.yaml; config.json is that of a repository on the hub.
    is_study = folder is None or (folder.is_dir() and not (folder / "config.json").is_file())
    schema = EvalConfig if is_study or given.calibration else PretrainedConfig
    config = load_typed(schema, [word for word in given.words if word not in named], "eval.yaml")
    if given.cfg:
        print(to_yaml(config), end="")
        return
    if len(named) > 1 or not (named or given.calibration):
        parser.error(f"{len(named)} folders given, wanted one, as in: python eval/run.py runs/demo")
    # runs/dmeo is mistyped, where there is a folder runs, and no repository of the owner `runs`.
    is_path = folder is not None and len(folder.parts) > 1 and folder.parent.is_dir()
    if folder and not folder.is_dir() and (is_path or given.calibration):
        raise UserError(f"no folder {folder}: name a study or a run, as in runs/demo")
    # Here, so that the lines above answer at once.
    from soluscope.evaluation.suite import calibrate, evaluate, evaluate_pretrained

    say = partial(print, file=sys.stderr)
    if given.calibration:
        calibrate(given.calibration, config, folder, say)
    elif isinstance(config, PretrainedConfig):
        path = evaluate_pretrained(named[0], config, say)
        print(f"report: {path}")
    elif folder:
        path = evaluate(folder, config, say)
        print(f"{path} is written; 'python eval/report.py {path.parent}' makes the report")


if __name__ == "__main__":
    run_command(main)
