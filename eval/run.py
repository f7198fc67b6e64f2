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
    if calibrated:
        from soluscope.suite import calibrate

        folder = Path(folders[0]) if folders else None
        calibrate(calibrated[0].strip("-"), config, folder)
        return
    if len(folders) != 1:
        raise UserError(
            f"{len(folders)} folders given, wanted one, as in: python eval/run.py runs/demo"
        )
    if not Path(folders[0]).is_dir():
        raise UserError(f"no folder {folders[0]}: name a study or a run, as in runs/demo")
    from soluscope.suite import evaluate  # here, so that the lines above answer at once

    path = evaluate(Path(folders[0]), config, lambda text: print(text, file=sys.stderr))
    print(f"{path} is written; 'python eval/report.py {path.parent}' makes the report")


if __name__ == "__main__":
    run_command(main)
