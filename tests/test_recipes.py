"""The README's recipes, followed exactly in a copy: one new file each, which all parts of the package find."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS_AFTER_S, ROOT

from soluscope.results import Comparison, GateResult, Measurement, Term, Verdict, of_kind, read

pytestmark = pytest.mark.slow

VARIANT = '''"""SoLU, then each neuron times one constant, with a bias: a static variant made up by a test.

Source: none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from soluscope.variants import Variant
from soluscope.variants._parts import StaticParams, solu

if TYPE_CHECKING:
    from soluscope.norms import StaticNorm


def build_norm(d_mlp: int, params: StaticParams) -> StaticNorm:
    from soluscope.norms import StaticNorm

    class Biased(StaticNorm):
        centres = False
        affine_part = ("w", "b")

    return Biased(d_mlp)


VARIANT = Variant(
    nonlinearity=solu,
    hooked_act_fn="solu_ln",
    role="static",
    build_norm=build_norm,
    params=StaticParams,
    after="solu_gain",
    adds="a per-neuron gain and a bias",
)
'''
PROBE = '''"""P99: Largest activation

Question:
    How large is the largest activation after the norm?

Answers:
    above 1: It is larger than 1.
    below 1: It is smaller than 1.

Formula:
    max_j |post_j|, over the neurons j of a token

Reading:
    Large where one neuron dominates.

Pitfalls:
    The other neurons are not measured.

Source:
    made up by a test
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from soluscope.hooked.activations import HookedRun, planted
from soluscope.probes import Figure, Gate, Measured, Probe, Quantity


def measure(run: HookedRun) -> Measured:
    """Return the largest absolute value of post, one per token."""
    return Measured({"largest": run.post.abs().amax(-1)})


def known() -> Iterator[tuple[HookedRun, dict[str, Any]]]:
    """Yield activations 1 and -1 about their mean, at three gains."""
    for gain in (2.0, 3.0, 7.0):
        run = planted(torch.tensor([[[1.0, -1.0], [3.0, 1.0]]]), gain=gain)
        yield run, {"largest": [gain, gain]}


PROBE = Probe(
    __doc__,
    measure=measure,
    known=known,
    tested="largest",
    gates=(
        Gate("smear_shared", "largest", above=1.0),
        Gate("quiet", "largest", within=1e-4),
    ),
    quantities={"largest": Quantity("activation", "largest absolute value of post")},
    streams=("natural",),
    figures=(Figure("Largest activation", ("largest",)),),
)
'''
CONTROL = '''"""C99: pinned, and quiet. The codes of `pinned` at a kappa 1e8 times larger.

The largest activation before the norm is .385 and the gain 3.2e-6, so that no activation after the
norm reaches 1e-5.

Source: made up by a test.
"""

from __future__ import annotations

import torch

from soluscope.controls import Control, Planted, _shell
from soluscope.controls.smear_shared import VOCAB, A, B

N, KAPPA = 32, 1e14
EPS = KAPPA / N**2


def build() -> Planted:
    low = _shell.codes(0, 1 + len(B), 8, N)
    pre = torch.cat([low[:1], 2 * _shell.one_hot(len(A), N), low[1:]])
    effect = _shell.random_effect(1, _shell.post(low, EPS), len(VOCAB), sd=1.2)
    model = _shell.anchored(pre, effect, EPS)
    return Planted(model, {"natural": _shell.natural(model, VOCAB, n_rows=48)})


CONTROL = Control(section="C99", truth="Nothing after the norm is above 1e-5.", build=build)
'''
SWEEP = """
program: train/run.py
method: grid
parameters:
  study: {value: recipes}
  size: {value: tiny}
  corpus.max_mb: {value: 1}
  train.steps: {value: 12}
  train.lr: {value: 4e-3}
  seed: {values: [0, 1]}
  variant: {values: [solu, solu_biased, solu_ln]}
"""
PARTS = (
    "src", "configs", "docs", "sweeps", "tests", "train", "eval", "benchmarks", "README.md", "Makefile",
    "pyproject.toml", "constraints.txt", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE",
)  # fmt: skip
NEW = {
    "src/soluscope/variants/solu_biased.py": VARIANT,
    "configs/variant/solu_biased.yaml": "variant: solu_biased\n",
    "src/soluscope/probes/largest_activation.py": PROBE,
    "src/soluscope/controls/quiet.py": CONTROL,
}

ADDED = {
    "| `solu` | a = x softmax(x)": "| `solu_biased` | c a + b | static: a bias |\n",
    "| `linear_mlp` |": "| `quiet` | C99 | The codes of C3 | Nothing above 1e-5 |\n",
    "### P22 blocked_norm": "### P99 largest_activation\n\n*How large?*\n\n",
}
"""Text of docs/protocol.md -> lines that the recipes insert above."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the clone with a new variant, probe and control, each as CONTRIBUTING.md says."""
    folder = tmp_path_factory.mktemp("recipes")
    for part in PARTS:
        source = ROOT / part
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / part)
    for path, content in NEW.items():
        (folder / path).write_text(content)
    protocol = folder / "docs" / "protocol.md"
    text = protocol.read_text()
    for before, lines in ADDED.items():
        assert text.count(before) == 1
        text = text.replace(before, lines + before)
    protocol.write_text(text)
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


def python(copy: Path, *words: str) -> str:
    """Run `python words` in the copy, and return the output."""
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, capture_output=True, text=True, timeout=HANGS_AFTER_S,
        env=os.environ | {"PYTHONPATH": str(copy / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_new_variant_probe_and_control_work_from_training_to_the_report(copy: Path) -> None:
    probes = "eval.probes=[engagement,largest_activation]"
    words = ("eval.n_tokens=500", "eval.n_loss_tokens=1000", "eval.n_draws=200", "wandb=off")
    python(copy, "sweeps/launch.py", "sweep.yaml", probes, *words)
    study = copy / "runs" / "recipes"
    records = read(study / "results.jsonl")
    (static,) = (
        record for record in of_kind(records, Comparison)
        if record.term is Term.STATIC and record.cluster == "seed"
    )  # fmt: skip
    assert (static.arm, static.against) == ("solu_ln", "solu_biased")
    assert static.verdict in Verdict
    steps = [r.step for r in of_kind(records, Comparison) if r.term is Term.STEP]
    assert steps == [("solu", "solu_ln")]  # solu_biased is not in solu_ln's chain
    measured = {r.arm for r in of_kind(records, Measurement) if r.probe == "largest_activation"}
    assert measured == {"solu", "solu_biased", "solu_ln"}
    gates = [g for g in of_kind(records, GateResult) if g.probe == "largest_activation"]
    assert {(g.control, g.section, g.passed) for g in gates} == {
        ("smear_shared", "C1", True),
        ("quiet", "C99", True),
    }
    page = (study / "report.html").read_text()
    for text in ("P99 Largest activation", "solu_biased", "quiet"):
        assert text in page


@pytest.mark.long
def test_the_tests_over_the_folders_hold_for_the_new_members(copy: Path) -> None:
    names = "solu_biased or largest_activation or quiet"
    files = (
        "test_every_variant.py",
        "test_convert.py",
        "test_every_probe.py",
        "test_every_control.py",
    )
    python(copy, "-m", "pytest", "-q", "-k", names, *(f"tests/{name}" for name in files))
    python(copy, "-m", "pytest", "-q", "tests/test_layers.py", "tests/test_readme.py")
