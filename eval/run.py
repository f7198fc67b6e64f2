"""Probe trained models: every finished run below a folder, or one run; or a pretrained model.

    python eval/run.py runs/demo probes=[engagement,scale_freeze] n_tokens=2000
    python eval/run.py solu-1l data=stdlib study=runs/demo
    python eval/run.py --controls
    python eval/run.py --false-positives runs/demo

Words are a folder, key=value, or YAML files. Goes on where an interrupted evaluation stopped.
A pretrained model is one of the SoLU family: a name of TransformerLens's (solu-1l, gelu-1l, solu-2l, …),
owner/name on the Hugging Face hub, or a folder with its config.json. Its study is runs/<name>, which can
be named from then on as any other; the report is made at once.
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
from soluscope.config import EvalConfig, PretrainedConfig, help_lines, load_typed, to_yaml
from soluscope.errors import UserError, run_command


def main(arguments: list[str]) -> None:
    if "--help" in arguments:
        probes = ", ".join(plugins.names("soluscope.probes"))
        known = list(help_lines(EvalConfig))
        more = [line for line in help_lines(PretrainedConfig) if line not in known]
        lines = [__doc__, *known, "", "with a pretrained model:", *more, "", f"probes: {probes}"]
        print("\n".join(lines))
        return
    named = [
        w for w in arguments if "=" not in w and not w.startswith("-") and not w.endswith(".yaml")
    ]
    folder = Path(named[0]) if named else None
    calibrated = [word for word in ("--controls", "--false-positives") if word in arguments]
    # The folder of a trained run holds config.yaml; config.json is that of a repository on the hub.
    is_study = folder is None or (folder.is_dir() and not (folder / "config.json").is_file())
    schema = EvalConfig if is_study or calibrated else PretrainedConfig
    words = [word for word in arguments if word not in (*named, *calibrated, "--cfg")]
    config = load_typed(schema, words, "eval.yaml")
    if "--cfg" in arguments:
        print(to_yaml(config), end="")
        return
    if len(calibrated) > 1:
        raise UserError(f"{' and '.join(calibrated)} given, wanted one of them at a time")
    if len(named) > 1 or not (named or calibrated):
        raise UserError(
            f"{len(named)} folders given, wanted one, as in: python eval/run.py runs/demo"
        )
    # runs/dmeo is mistyped, where there is a folder runs, and no repository of the owner `runs`.
    is_path = folder is not None and len(folder.parts) > 1 and folder.parent.is_dir()
    if folder and not folder.is_dir() and (is_path or calibrated):
        raise UserError(f"no folder {folder}: name a study or a run, as in runs/demo")
    # Here, so that the lines above answer at once.
    from soluscope.evaluation.suite import calibrate, evaluate, evaluate_pretrained

    say = partial(print, file=sys.stderr)
    if calibrated:
        calibrate(calibrated[0].strip("-"), config, folder, say)
    elif isinstance(config, PretrainedConfig):
        path = evaluate_pretrained(named[0], config, say)
        print(f"report: {path}")
    elif folder:
        path = evaluate(folder, config, say)
        print(f"{path} is written; 'python eval/report.py {path.parent}' makes the report")


if __name__ == "__main__":
    run_command(main)
