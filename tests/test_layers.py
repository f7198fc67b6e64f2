"""Imports point one way, and the open sets are their folders: read from the source, never run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from soluscope import plugins

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "soluscope"
ENTRY_POINTS = (
    "train/run.py", "train/export.py", "eval/run.py", "eval/report.py", "sweeps/launch.py",
)  # fmt: skip
OPEN_SETS = (
    "soluscope.variants", "soluscope.probes", "soluscope.controls", "soluscope.data.sources",
    "soluscope.engines",
)  # fmt: skip
SLOW = {"torch", "lightning", "transformer_lens", "transformers", "datasets"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
VARIANTS = tuple(sorted(m for m in MODULES if m.startswith("soluscope.variants")))
PROBES = tuple(sorted(m for m in MODULES if m.startswith("soluscope.probes")))
CONTROLS = tuple(sorted(m for m in MODULES if m.startswith("soluscope.controls")))
ENGINES = tuple(sorted(m for m in MODULES if m.startswith("soluscope.engines")))
REPORT = tuple(sorted(m for m in MODULES if m.startswith("soluscope.report")))


@cache
def imports(path: Path, at_load: bool = False) -> frozenset[str]:
    """Full names of what a file imports when it runs; imports for type checkers left out.

    Args:
        path: a Python file.
        at_load: leave out imports inside functions too.
    """
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text()), at_load):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` is of the module, `from module import name` of `module`.
            found |= {name if name in MODULES else str(node.module) for name in full}
    return frozenset(found)


def _statements(node: ast.AST, at_load: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if at_load and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from _statements(child, at_load)


def own(module: str) -> frozenset[str]:
    """Which of our modules a module imports, anywhere in it."""
    return frozenset(name for name in imports(MODULES[module]) if name.startswith("soluscope"))


@cache
def reached(module: str) -> frozenset[str]:
    """All that importing a module brings in: our modules by name, others by their top name."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            waiting += imports(MODULES[name], at_load=True)
            waiting += [name.rpartition(".")[0]] if "." in name else []
    return frozenset(name if name in MODULES else name.split(".")[0] for name in seen)


# The lowest layers and what each may import of ours; the open sets' own packages come with them.
ALLOWED = {
    "soluscope.errors": set(),
    "soluscope.plugins": {"errors"},
    "soluscope.files": {"errors"},
    "soluscope.results": {"errors", "files"},
    "soluscope.config": {"plugins", "errors", "files"},
    "soluscope.stats": set(),
    "soluscope.norms": set(),
    "soluscope.pairs": {"errors"},
    "soluscope.streams": {"plugins", "errors", "data.cache", "pairs"},
    "soluscope.activations": {"errors", "streams"},
    "soluscope.ablation": {"activations", "errors"},
    "soluscope.summaries": {"activations", "probes", "results", "stats", "streams"},
    "soluscope.calibration": {
        "plugins", "activations", "checkpoint", "probes", "probes._estimates", "results", "stats", "streams",
        "summaries",
    },
    "soluscope.compare": {"stats", "errors", "files", "results"},
    "soluscope.model": {"config", "norms", "variants"},
    "soluscope.checkpoint": {"plugins", "config", "errors", "files", "model", "run_folder"},
    "soluscope.convert": {
        "plugins", "config", "errors", "checkpoint", "model", "norms", "variants",
    },
    "soluscope.bridge": {"plugins", "config", "errors", "checkpoint", "model", "norms"},
    "soluscope.pretrained": {"plugins", "checkpoint", "convert", "errors", "files"},
    "soluscope.pretrained_run": {
        "activations", "checkpoint", "config", "convert", "data.cache", "data.tokenizer", "errors", "files",
        "pretrained", "results", "run_folder",
    },
    "soluscope.export": {
        "plugins", "config", "errors", "files", "checkpoint", "convert", "model", "report.controls",
        "report.findings", "results", "run_folder", "variants",
    },
    "soluscope.run_folder": {"errors", "files"},
    "soluscope.wandb_client": {"errors"},
    "soluscope.processes": {"config", "errors", "run_folder"},
    "soluscope.tracking": {"plugins", "config", "errors", "files", "report.figures", "results", "wandb_client"},
    "soluscope.sweep": {"config", "errors"},
    "soluscope.jobs": {"config", "errors", "files", "processes", "run_folder", "training"},
    "soluscope.launch": {
        "config", "data.cache", "errors", "jobs", "plugins", "report", "run_folder", "suite", "sweep",
        "tracking",
    },
}  # fmt: skip


@pytest.mark.parametrize("module", ALLOWED)
def test_module_imports_only_what_lies_below_it(module: str) -> None:
    assert own(module) <= {f"soluscope.{name}" for name in ALLOWED[module]}


def test_imports_never_go_in_a_circle() -> None:
    def below(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in sound:
            for name in own(module) - {module}:
                below(name, (*above, module))
            sound.add(module)

    sound: set[str] = set()
    for module in MODULES:
        below(module, ())


def test_nothing_imports_the_entry_points_and_only_they_run_the_top_layer() -> None:
    top = {"soluscope.suite", "soluscope.training", "soluscope.jobs", "soluscope.launch", *ENGINES}
    for module in MODULES:
        assert not {"train", "eval", "sweeps", "benchmarks"} & imports(MODULES[module]), module
        if module not in top:
            assert not own(module) & top, module


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_entry_point_loads_only_what_answers_at_once(script: str) -> None:
    light = {"config", "errors", "plugins", "run_folder", "jobs", "launch"}
    names = imports(ROOT / script, at_load=True)
    assert {n for n in names if n.startswith("soluscope.")} <= {f"soluscope.{n}" for n in light}
    assert {n for n in names if not n.startswith("soluscope.")} <= sys.stdlib_module_names
    assert not SLOW & set().union(*(reached(name) for name in names))


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_entry_point_holds_no_logic(script: str) -> None:
    tree = ast.parse((ROOT / script).read_text())
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert defined == ["main"]


@pytest.mark.parametrize("module", VARIANTS)
def test_variant_sees_neither_model_nor_configuration(module: str) -> None:
    allowed = {"soluscope.variants", "soluscope.variants._parts", "soluscope.norms",
               "soluscope.errors"}  # fmt: skip
    assert own(module) <= allowed


@pytest.mark.parametrize("module", PROBES)
def test_probe_sees_neither_variant_nor_configuration_nor_training(module: str) -> None:
    allowed = {"soluscope.probes", "soluscope.activations", "soluscope.ablation", "soluscope.stats",
               "soluscope.errors"}  # fmt: skip
    members = {name for name in own(module) if name.rpartition(".")[2].startswith("_")}
    assert own(module) - members <= allowed


@pytest.mark.parametrize("module", CONTROLS)
def test_control_sees_no_probe_and_nothing_of_training(module: str) -> None:
    others = {name for name in own(module) if not name.startswith("soluscope.controls")}
    assert others <= {"soluscope.streams", "soluscope.errors"}


@pytest.mark.parametrize("module", REPORT)
def test_report_sees_rows_and_no_model(module: str) -> None:
    assert not SLOW & reached(module)
    closed = {"activations", "suite", "training", "convert", "checkpoint", "model", "config",
              "variants", "stats", "streams"}  # fmt: skip
    assert not own(module) & {f"soluscope.{name}" for name in closed}
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & {*SLOW, "pandas"}


@pytest.mark.parametrize("module", [*VARIANTS, *PROBES, *CONTROLS])
def test_members_of_open_sets_can_be_read_without_torch(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(MODULES[module], at_load=True)} & SLOW
    assert not SLOW & reached(module)


@pytest.mark.parametrize(
    "module", ["soluscope", "soluscope.config", "soluscope.results", "soluscope.data.cache",
               "soluscope.sweep", "soluscope.jobs", "soluscope.launch", "soluscope.report", *ENGINES]
)  # fmt: skip
def test_module_is_loaded_without_torch(module: str) -> None:
    assert not SLOW & reached(module)


def test_training_loads_neither_transformer_lens_nor_datasets() -> None:
    assert {"torch", "lightning", "soluscope.model"} <= reached("soluscope.training")
    assert not {"transformer_lens", "transformers", "datasets", "tokenizers", "pandas"} & reached(
        "soluscope.training"
    )


def strings_in(path: Path) -> set[str]:
    """The string constants of a file, docstrings left out."""
    tree = ast.parse(path.read_text())
    docs = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in docs)
    return {n.value for n in constants if isinstance(n.value, str)}


@pytest.mark.parametrize("package", OPEN_SETS)
def test_open_set_has_no_list_kept_by_hand(package: str) -> None:
    members = set(plugins.names(package))
    assert len(members) >= 3
    for module, path in MODULES.items():
        assert not members <= strings_in(path), f"{module} lists {package}"


@pytest.mark.parametrize("module", ["model", "convert", "bridge", "training", "checkpoint", "export", "suite",
                                    "norms", "activations", "ablation", "summaries",
                                    "report.figures", "report.page"])  # fmt: skip
def test_no_variant_is_known_by_its_name(module: str) -> None:
    names = set(plugins.names("soluscope.variants"))
    assert not names & strings_in(MODULES[f"soluscope.{module}"])


@pytest.mark.parametrize("package", OPEN_SETS)
def test_each_member_defines_the_one_thing_of_its_set(package: str) -> None:
    for name in plugins.names(package):
        assert type(plugins.pick(package, name)).__module__ == package


@pytest.mark.parametrize("module", MODULES)
def test_module_says_what_it_is_and_annotates_lazily(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    assert ast.get_docstring(tree), module
    annotated = (ast.FunctionDef, ast.AsyncFunctionDef, ast.AnnAssign)
    if any(isinstance(node, annotated) for node in ast.walk(tree)):
        assert "__future__" in imports(MODULES[module])


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_entry_point_says_how_it_is_called(script: str) -> None:
    assert f"python {script} " in str(ast.get_docstring(ast.parse((ROOT / script).read_text())))
