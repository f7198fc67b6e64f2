"""Probe trained models: every finished run below a folder, or one run.

    python eval/run.py runs/demo probes=[engagement,scale_freeze] n_tokens=2000
    python eval/run.py --controls
    python eval/run.py --false-positives runs/demo

Words are a folder, key=value, or YAML files. Goes on where an interrupted evaluation stopped.
  --controls         put the probes before the models with known answers, print who passed, and stop
  --false-positives  count how often the probes' tests speak on untrained models and shuffled labels
                     (a minute a probe), print it, keep it for the report of the folder, and stop
  --cfg              print the merged configuration and stop
  --help             this text and every key, its default and its meaning
"""

import sys
from functools import partial
from pathlib import Path

from soluscope import plugins
from soluscope.config import EvalConfig, help_lines, load_typed, to_yaml
from soluscope.errors import UserError, run_command


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        probes = ", ".join(plugins.names("soluscope.probes"))
        print("\n".join([__doc__, *help_lines(EvalConfig), "", f"probes: {probes}"]))
        return
    folders = [
        w for w in arguments if "=" not in w and not w.startswith("-") and not w.endswith(".yaml")
    ]
    switches = ("--cfg", "--controls", "--false-positives")
    words = [word for word in arguments if word not in (*folders, *switches)]
    config = load_typed(EvalConfig, words, "eval.yaml")
    if "--cfg" in arguments:
        print(to_yaml(config), end="")
        return
    calibrated = [switch for switch in switches[1:] if switch in arguments]
    if len(calibrated) > 1:
        raise UserError(f"{' and '.join(calibrated)} given, wanted one of them at a time")
    if len(folders) > 1 or not (folders or calibrated):
        raise UserError(
            f"{len(folders)} folders given, wanted one, as in: python eval/run.py runs/demo"
        )
    folder = Path(folders[0]) if folders else None
    if folder and not folder.is_dir():
        raise UserError(f"no folder {folder}: name a study or a run, as in runs/demo")
    from soluscope.suite import calibrate, evaluate  # here, so that the lines above answer at once

    say = partial(print, file=sys.stderr)
    if calibrated:
        calibrate(calibrated[0].strip("-"), config, folder, say)
    elif folder:
        path = evaluate(folder, config, say)
        print(f"{path} is written; 'python eval/report.py {path.parent}' makes the report")


if __name__ == "__main__":
    run_command(main)
