"""Exports: pushed to a hub on loopback by the real client, and loaded from it by the code on the card.

huggingface_hub reads HF_ENDPOINT and HF_HOME when it is imported. So code that uses the hub runs in a
separate process, which returns the results.
"""

from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from _hub import LARGE, Hub
from conftest import VARIANTS, command, run_python, tiny_config, train_silently
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from test_every_variant import NORMS
from transformer_lens import HookedTransformer
from transformer_lens.supported_models import MODEL_ALIASES

import soluscope
from soluscope import results
from soluscope.errors import UserError
from soluscope.export import _lens_state, export, load
from soluscope.hooked.convert import SoluscopeTransformer
from soluscope.hooked.pretrained import load_pretrained
from soluscope.results import Measurement, Rated, Rating
from soluscope.runs.folder import Run

TOKEN = "hf_ours"
TEXT = "def f(x): return 12 + <|BOS|>"
TOKENS = torch.randint(512, (3, 20), generator=torch.Generator().manual_seed(5))
LENS = "solu_ln-s0-lens"
"""The run whose mid norm has the same epsilon as its other norms, 1e-5."""
RUNS = [*(f"{variant}-s0" for variant in VARIANTS), LENS]
FAMILY = dict(
    zip(RUNS, sorted(name for name in MODEL_ALIASES if name.startswith("NeelNanda/")), strict=False)
)
"""Names from TransformerLens's own list. Our hub holds the exports under these names."""
HOSTILE = "a|b <script>alert(1)</script> [x](y) `c` **d** # e\n# heading <!-- f"


# --- the hub and its client -----------------------------------------------------------------------


class WritableHub(Hub):
    """The hub with the routes of a push.

    POST  /api/repos/create                       a new repository; 409 if it exists
    POST  /api/validate-yaml                      the card's front matter
    POST  /api/models/{repo}/preupload/{rev}      which files are large
    POST  /{repo}.git/info/lfs/objects/batch      addresses for large files
    PUT   /put/{sha256}                           a large file
    POST  /api/models/{repo}/commit/{rev}         small files, sums of large files, deletions
    """

    def __enter__(self) -> WritableHub:
        super().__enter__()
        self.put_here: dict[str, bytes] = {}
        self.commit_messages: list[str] = []
        served = self.server.RequestHandlerClass
        self.server.RequestHandlerClass = type("Handler", (_Writing, served), {})
        return self

    def files(self, repo: str) -> dict[str, bytes]:
        """Return the files of the repository's main branch."""
        return self.commits[repo][self.branches[repo]["main"]]


class _Writing:
    hub: WritableHub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        self.hub.requests.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401)
        kind = path.split("/")[-1 if path.endswith(("batch", "create", "yaml")) else -2]
        if isinstance(fault := self.hub.faults.get(kind), int):
            return self._refuse(fault)
        if kind == "commit":
            return self._commit("/".join(path.split("/")[3:5]), body.splitlines())
        told = json.loads(body)
        if kind == "create":
            repo = f"{told['organization']}/{told['name']}"
            status = 409 if repo in self.hub.commits else 200
            if status == 200:
                self.hub.put(repo, {})
            return self._send(status, json.dumps({"url": f"{self.hub.url}/{repo}"}).encode(), {})
        if kind == "validate-yaml":
            assert told["content"].startswith("---\ntags:\n- ")
            return self._json({"errors": [], "warnings": []})
        if kind == "preupload":
            names = [file["path"] for file in told["files"]]
            modes = ["lfs" if name.endswith(LARGE) else "regular" for name in names]
            return self._json({"files": [
                {"path": name, "uploadMode": mode, "shouldIgnore": False}
                for name, mode in zip(names, modes, strict=True)
            ]})  # fmt: skip
        place = {"href": f"{self.hub.url}/put/", "header": {}}
        return self._json({"objects": [
            thing | {"actions": {"upload": place | {"href": place["href"] + thing["oid"]}}}
            for thing in told["objects"]
        ]})  # fmt: skip

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sum_ = self.path.split("/")[-1]
        assert hashlib.sha256(body).hexdigest() == sum_
        if isinstance(fault := self.hub.faults.get("put"), int):
            return self._refuse(fault)
        self.hub.put_here[sum_] = body
        return self._send(200, b"", {"ETag": sum_})

    def _commit(self, repo: str, lines: list[bytes]) -> None:
        files = dict(self.hub.files(repo))
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                self.hub.commit_messages.append(value["summary"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.put_here[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        sha = self.hub.put(repo, files)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})


def found_in(model: HookedTransformer) -> dict:
    with torch.no_grad():
        logits = model(TOKENS).numpy()
    return {
        "weights": {name: value.detach().numpy() for name, value in model.named_parameters()},
        "logits": logits,
        "tokens": model.to_tokens(TEXT)[0].tolist(),
        "class": type(model).__name__,
    }


def run_there(code: str) -> dict:
    """Run a card's code, and return its model's weights, logits and tokens, or its error."""
    names: dict = {}
    try:
        exec(code, names)
    except (UserError, AssertionError) as error:
        return {"error": str(error)}
    return found_in(names["model"])


def lens_there(name: str) -> dict:
    """Return the same for TransformerLens's own from_pretrained."""
    return run_there(
        "from transformer_lens import HookedTransformer\n"
        f"model = HookedTransformer.from_pretrained_no_processing({name!r}, device='cpu')"
    )


def export_there(*words: object) -> tuple:
    try:
        return export(*words)
    except UserError as error:
        return ("refused", str(error))


@pytest.fixture(scope="module")
def hub() -> Iterator[WritableHub]:
    with WritableHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def there(hub, tmp_path_factory):
    """Yield a function that runs functions of this file in a process that can use only our hub."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_DISABLE_XET", "1")  # its protocol needs another server
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(os.getenv, "HF_ENDPOINT").result() == hub.url
            yield lambda function, *words: pool.submit(function, *words).result()


# --- runs and their exports -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tiny_study, tmp_path_factory) -> Path:
    """Return the tiny study with one more run, LENS, which has been probed."""
    runs_dir = tmp_path_factory.mktemp("export") / "runs"
    study = runs_dir / "tiny"
    shutil.copytree(tiny_study, study)
    words = ("study=tiny", "variant=solu_ln", "mid.eps=1e-5", "tag=lens")
    tokens = f"tokens.cache_dir={tiny_study.parent / '.tokens'}"
    assert train_silently(tiny_config(runs_dir, *words, tokens)).name == LENS
    of = {
        "study": "tiny",
        "run": LENS,
        "config": Run(study / LENS).facts.config,
        "stream": "natural",
    }
    r = Measurement(probe="engagement", quantity="r", statistic="median", value=0.25, low=0.125, high=0.5, n=77,
            unit="share", note=HOSTILE, **of)  # fmt: skip
    results.write(study / "results.jsonl", [
        r,
        replace(r, stream="code", value=0.9375),
        replace(r, x=3.0, value=0.8125),
        replace(r, run="solu-s0", value=0.6875),
        replace(r, config="another", value=0.5625),
        Rated(term=Rating.SHARE, study="tiny", arm="solu_ln", rater="ann", value=0.4375, unit="share"),
    ])  # fmt: skip
    return study


@pytest.fixture(scope="module")
def trained(study) -> dict[str, dict]:
    """Return the weights, logits and tokens of the runs themselves, by soluscope.load."""
    return {run: found_in(soluscope.load(study / run)) for run in RUNS}


@pytest.fixture(scope="module")
def pushed(study, there, tmp_path_factory) -> dict[str, Path]:
    """Push the export of each run under a name of the family, and return its folder."""
    out = tmp_path_factory.mktemp("out")
    for run in RUNS:
        told = there(export_there, study / run, out / run, FAMILY[run])
        assert told[0] != "refused", told
        assert told[1].endswith(FAMILY[run])
    return {run: out / run for run in RUNS}


def obstacle_of(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["act_fn"].startswith("soluscope:")


def codes(folder: Path) -> list[str]:
    """Return the Python code on a card: for soluscope, TransformerLens 3.9 and 4."""
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)


def assert_same(found: dict, wanted: dict) -> None:
    assert "error" not in found, found["error"]
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, value in wanted["weights"].items():
        np.testing.assert_array_equal(found["weights"][name], value, err_msg=name)
    np.testing.assert_allclose(found["logits"], wanted["logits"], atol=1e-5, rtol=0)
    assert found["tokens"] == wanted["tokens"]


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_transformer_lens_loads_a_run_right_or_refuses_it_by_name(run, pushed, there, trained):
    found = there(lens_there, FAMILY[run])
    if "error" in found:
        assert f"soluscope:{run.split('-')[0]}" in found["error"]
        assert not list(pushed[run].glob("*.pth"))
    else:
        assert_same(found, trained[run])
        assert found["class"] == "HookedTransformer"


def test_what_transformer_lens_can_express_is_not_refused(pushed):
    expressed = {run for run in RUNS if not obstacle_of(pushed[run])}
    assert {"gelu-s0", "solu-s0", LENS} <= expressed
    assert not {f"{v}-s0" for v, norm in NORMS.items() if not norm.is_layer_norm} & expressed


@pytest.mark.parametrize("run", RUNS)
def test_the_code_of_the_card_loads_the_run(run, pushed, there, trained):
    ours, *lens = codes(pushed[run])
    found = there(run_there, ours)
    assert_same(found, trained[run])
    np.testing.assert_allclose(found["logits"], trained[run]["logits"], rtol=0, atol=1e-5)
    assert bool(lens) is not obstacle_of(pushed[run])
    if lens:
        assert FAMILY[run] in lens[0]
        found = there(run_there, lens[0])
        assert_same(found, trained[run])
        assert found["class"] == "HookedTransformer"


def test_the_code_for_transformer_lens_stops_at_a_model_of_our_own(pushed, there):
    """The code of another model's card raises an error that names our variant, and gives no model."""
    code = codes(pushed[LENS])[1].replace(FAMILY[LENS], FAMILY["solu_frozen_ln-s0"])
    assert "soluscope:solu_frozen_ln" in there(run_there, code)["error"]


@pytest.mark.parametrize("run", [LENS, "gelu-s0", "solu_gain-s0"])
def test_a_card_that_was_not_pushed_loads_its_own_folder(
    run, study, trained, tmp_path, monkeypatch
):
    obstacle, url = export(study / run, tmp_path / "out")
    assert url is None
    monkeypatch.chdir(tmp_path / "out")
    for code in codes(Path())[: 1 if obstacle else 2]:
        names: dict = {}
        exec(code, names)
        assert_same(found_in(names["model"]), trained[run])


@pytest.mark.parametrize("run", RUNS)
def test_load_pretrained_takes_what_is_of_the_family_and_refuses_the_rest(run, pushed, trained):
    if obstacle_of(pushed[run]):
        with pytest.raises(UserError, match=f"soluscope:{run.split('-')[0]}"):
            load_pretrained(str(pushed[run]))
    else:
        model = load_pretrained(str(pushed[run]))
        assert_same(found_in(model), trained[run])
        facts, wanted = model.facts, Run(pushed[run]).facts
        for name in (
            "variant",
            "eps",
            "lr",
            "steps",
            "tokens",
            "bos",
            "tokenizer_hash",
            "precision",
        ):
            assert getattr(facts, name) == getattr(wanted, name), name


@pytest.mark.parametrize("run", RUNS)
def test_the_weights_are_the_runs_own_and_hold_tensors_only(run, study, pushed):
    wanted = load_file(study / run / "model.safetensors")
    stored = [load_file(pushed[run] / "model.safetensors")]
    stored += [torch.load(path, weights_only=True) for path in pushed[run].glob("*_final.pth")]
    for state in stored:
        assert all(torch.equal(state[name], value) for name, value in wanted.items())
        assert all(key.endswith(("mask", "IGNORE")) for key in state.keys() - wanted.keys())


# --- near misses that are refused -----------------------------------------------------------------


def test_a_nonlinearity_that_is_nearly_transformer_lenss_is_refused(study):
    run = Run(study / "gelu-s0")
    model, facts = run.load_model(), run.facts
    assert _lens_state(model, facts)
    model.mlp(0).nonlinearity = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    with pytest.raises(UserError, match="nonlinearity"):
        _lens_state(model, facts)


@pytest.mark.parametrize("words", [{"eps": 1.1e-5}, {"ln_eps": 1e-6}])
def test_an_epsilon_that_transformer_lens_would_replace_is_refused(study, words):
    run = Run(study / LENS)
    model, facts = run.load_model(), run.facts
    assert _lens_state(model, facts)
    with pytest.raises(UserError, match="epsilon"):
        _lens_state(model, replace(facts, **words))


def test_a_model_that_computes_otherwise_for_any_other_reason_is_refused(study):
    run = Run(study / LENS)
    model, facts = run.load_model(), run.facts
    model.mlp(0).ln.forward = lambda mid: mid  # a difference that no rule covers
    with pytest.raises(UserError, match="differs"):
        _lens_state(model, facts)


# --- runs that others have changed ----------------------------------------------------------------


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return the content of each file below a folder, and None for each folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def received(study, tmp_path) -> Path:
    """Return a copy of a study with one run, which a test may change."""
    copy = tmp_path / "received"
    shutil.copytree(study / LENS, copy / LENS)
    for name in ("tokenizer.json", "data.json"):
        shutil.copyfile(study / name, copy / name)
    return copy / LENS


NAMES = (
    "/tmp/x", "../x", "a/b", "a\\b", ".", "..", "", " ", "a b", "x\n", "\n# y", "x" * 300, "é" * 200, "a`b",
    "a{b}", "\u202e", '");__import__("os").system("x")#', "${oc.env:HOME}", "a;b", "~", "C:x", 5, None,
    True, ["x"], {"x": 1},
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["run", "arm", "variant", "study", "init_from"])
def test_a_name_that_is_no_name_of_a_folder_is_refused_and_nothing_is_written(key, name, received):
    if key == "init_from" and name in (None, "a/b"):  # no origin, and a study with its run
        return
    facts = json.loads((received / "model.json").read_text())
    origin = {"run": name, "config": "0", "steps": 1, "tokens": 1}
    facts[key] = origin if key == "init_from" else name
    (received / "model.json").write_text(json.dumps(facts))
    before = tree(received.parents[1])
    with pytest.raises(UserError, match=r"model.json is broken \(") as caught:
        export(received, received.parents[1] / "out")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert tree(received.parents[1]) == before


@pytest.mark.parametrize(
    "name",
    [f"{LENS}/{file}" for file in ("config.yaml", "model.json", "model.safetensors", "done.json")]
    + ["tokenizer.json", "results.jsonl"],
)
def test_a_link_is_not_followed_into_an_export(name, received, study):
    path = received.parent / name
    secret = received.parents[1] / "secret"
    shutil.copyfile(study / name, secret)
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    with pytest.raises(UserError, match=f"{path.name} is a link"):
        export(received, received.parents[1] / "out")
    assert {each.name for each in received.parents[1].iterdir()} == {"received", "secret"}


def test_no_file_of_an_export_names_a_folder_of_this_machine(study, pushed):
    for folder in pushed.values():
        for name, content in tree(folder).items():
            assert str(study.parents[1]).encode() not in content, name
        config, wanted = Run(folder).config, Run(study / folder.name).config
        assert (config.hash, config.tokens.prepared) == (wanted.hash, None)


def test_an_environment_variable_that_a_received_run_names_is_not_exported(received, monkeypatch):
    monkeypatch.setenv("PLACE", "hf_secret")
    text = (received / "config.yaml").read_text().replace("init_from: null", "init_from: ${PLACE}")
    (received / "config.yaml").write_text(text)
    export(received, received.parents[1] / "out")
    exported = tree(received.parents[1] / "out")
    assert not [name for name, content in exported.items() if b"hf_secret" in content]
    assert b"init_from: ${PLACE}" in exported["config.yaml"]


# --- the card -------------------------------------------------------------------------------------


def rendered(folder: Path) -> str:
    _, _, body = (folder / "README.md").read_text().split("---\n", 2)
    return MarkdownIt("commonmark").enable("table").render(body)


def test_the_card_tells_configuration_losses_and_probes(pushed):
    card = rendered(pushed[LENS])
    done = json.loads((pushed[LENS] / "done.json").read_text())
    for name in ("select_loss", "report_loss"):
        assert f"<td>{done[name]:.6g}</td>" in card
    assert "<td>0.25 [0.125, 0.5]</td>" in card
    assert "<td>77</td>" in card
    assert "mid:\n  eps: 1.0e-05" in card
    facts = json.loads((pushed[LENS] / "model.json").read_text())
    assert f"<td>{facts['tokens']}</td>" in card
    assert "has not been probed yet" not in card


def test_an_export_tells_nothing_of_other_runs_configurations_texts_curves_and_raters(pushed):
    card = rendered(pushed[LENS])
    assert not any(value in card for value in ("0.938", "0.812", "0.688", "0.562", "0.437"))
    stored = results.read(pushed[LENS] / "results.jsonl")
    assert [row.value for row in stored] == [0.25, 0.9375, 0.8125]


def test_a_run_that_was_not_probed_says_so(pushed):
    assert "The model has not been probed yet." in rendered(pushed["gelu-s0"])


def test_text_from_data_is_shown_as_it_is(pushed):
    card = rendered(pushed[LENS])
    shown = " ".join(HOSTILE.split()).replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{shown}</td>" in card
    assert "<script" not in card


def test_a_card_of_our_own_variant_says_why_nothing_else_loads_it(pushed):
    for variant, norm in NORMS.items():
        if not norm.is_layer_norm:
            assert f"mid norm is {type(norm).__name__}, but" in rendered(pushed[f"{variant}-s0"])
    assert "the epsilon of its mid norm is 0.00256" in rendered(pushed["solu_ln-s0"])
    assert "nonlinearity" in rendered(pushed["gelu_ln-s0"])


# --- the hub --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_a_push_brings_the_folder_as_it_is(run, pushed, hub):
    wanted = {path.name: path.read_bytes() for path in pushed[run].iterdir()}
    assert hub.files(FAMILY[run]) == wanted


def test_a_second_push_replaces_the_first_in_one_commit_and_keeps_what_is_not_its_own(
    study, there, hub, tmp_path
):
    repo = "someone/model"
    hub.put(repo, {"LICENSE": b"theirs", "checkpoints/model_final.pth": b"another model"})
    there(export_there, study / LENS, tmp_path / "first", repo)
    assert {f"{LENS}_final.pth", "results.jsonl"} <= hub.files(repo).keys()
    n_commits = len(hub.commit_messages)
    told = there(export_there, study / "solu-s0", tmp_path / "second", repo)
    assert told == (None, f"{hub.url}/{repo}")
    assert len(hub.commit_messages) == n_commits + 1
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert "results.jsonl" not in wanted
    assert hub.files(repo) == wanted | {"LICENSE": b"theirs"}


@pytest.mark.parametrize(
    ("fault", "status", "said"),
    [
        ("create", 401, "HF_TOKEN"),
        ("create", 403, "HF_TOKEN"),
        ("put", 403, "HF_TOKEN"),
        ("commit", 403, "HF_TOKEN"),
        ("commit", 500, "answers 500"),
    ],
)
def test_a_push_that_is_refused_leaves_nothing_anywhere(
    fault, status, said, study, there, hub, tmp_path
):
    repo = f"someone/{fault}{status}"
    hub.faults[fault] = status
    try:
        told = there(export_there, study / LENS, tmp_path / "out", repo)
    finally:
        del hub.faults[fault]
    assert told[0] == "refused"
    assert said in told[1]
    assert "\n" not in told[1]
    assert not hub.commits.get(repo, {}) or not hub.files(repo)
    assert not list(tmp_path.iterdir())
    told = there(export_there, study / LENS, tmp_path / "out", repo)
    assert told == (None, f"{hub.url}/{repo}")


# --- the command ----------------------------------------------------------------------------------


def refused(*words: str | Path, **environment: str) -> str:
    """Return the only line that the refused command prints. The hub's client reads HF_HOME only at its import."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - kept.keys():
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        if "HF_HOME" in environment:
            done = run_python("-m", "soluscope", "export", *words)
        else:
            done = command("export", *words, status=2)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


def test_what_cannot_be_exported_is_refused_in_one_line(study, tmp_path):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(study / "solu-s0", unfinished)
    (unfinished / "done.json").unlink()
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    alone = tmp_path / "alone" / "solu-s0"
    shutil.copytree(study / "solu-s0", alone)
    out = tmp_path / "out"
    assert "required: out" in refused(study / "solu-s0")
    assert "does not exist" in refused(tmp_path / "nothing", out)
    assert "config.yaml" in refused(study, out)
    assert "has not finished" in refused(unfinished, out)
    assert "exists already" in refused(study / "solu-s0", full)
    assert "exists already" in refused(study / "solu-s0", full / "mine.txt")
    assert "tokenizer" in refused(alone, out)
    for name in ("name", "user/na me", "../x", "a/b/c", ""):
        assert "--push" in refused(study / "solu-s0", out, "--push", name, HF_TOKEN=TOKEN)
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "HF_TOKEN" in refused(study / "solu-s0", out, "--push", "user/name", **home)
    assert "127.0.0.1:9" in refused(
        study / "solu-s0", out, "--push", "user/name", HF_TOKEN=TOKEN, **home
    )
    assert (full / "mine.txt").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} <= {"unfinished", "full", "alone", "home"}


def test_the_command_exports_into_an_empty_folder_and_says_what_loads_it(study, tmp_path):
    (tmp_path / "out").mkdir()
    done = command("export", study / "solu_gain-s0", tmp_path / "out")
    assert "only soluscope loads it: its mid norm is Gain" in done.stdout
    assert isinstance(load(tmp_path / "out"), SoluscopeTransformer)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
