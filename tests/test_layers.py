"""The layers: imports point one way, and each open set is its folder. Imports are read from the source."""

from __future__ import annotations

import ast
import re
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
    "soluscope.engines", "soluscope.commands", "soluscope.proxies",
)  # fmt: skip
SLOW = {"torch", "lightning", "transformer_lens", "transformers", "datasets"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
VARIANTS = tuple(sorted(m for m in MODULES if m.startswith("soluscope.variants")))
SOURCES = tuple(sorted(m for m in MODULES if m.startswith("soluscope.data.sources")))
ENGINES = tuple(sorted(m for m in MODULES if m.startswith("soluscope.engines")))
REPORT = tuple(sorted(m for m in MODULES if m.startswith("soluscope.report")))


@cache
def imports(path: Path, at_load: bool = False) -> frozenset[str]:
    """Return the full names of a file's imports, without imports for type checkers.

    Args:
        path: a Python file.
        at_load: if True, also leave out imports inside functions.
    """
    found: set[str] = set()
    for node in _statements(ast.parse(path.read_text()), at_load):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` imports that module, `from module import name` imports `module`.
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
    """Return the names of our modules that a module imports, anywhere in its source."""
    return frozenset(name for name in imports(MODULES[module]) if name.startswith("soluscope"))


@cache
def reached(module: str) -> frozenset[str]:
    """Return every module that importing a module loads: ours by name, others by their top name."""
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


ORDER = (
    "errors", "terminal", "bars", "cores", "garbage", "workers", "files", "text", "plugins", "results", "reading",
    "config", "config_help", "memory", "wandb_client", "serving", "norms", "constant_norm", "variants", "model",
    "data", "comparison", "runs", "training", "hooked", "probes", "controls", "removal", "report", "evaluation",
    "neurons", "notebook", "editor", "proxies", "rating", "export", "launching", "engines", "commands", "__main__",
)  # fmt: skip
"""Folders and modules of the package: each may import itself and the entries before it."""


def layer_of(module: str) -> str:
    return module.split(".")[1]


def test_the_order_names_every_folder_and_module_once() -> None:
    assert sorted(ORDER) == sorted({layer_of(m) for m in MODULES if "." in m})


@pytest.mark.parametrize("layer", ORDER)
def test_imports_go_down_the_order_only(layer: str) -> None:
    below = set(ORDER[: ORDER.index(layer) + 1])
    for module in MODULES:
        if "." in module and layer_of(module) == layer:
            upward = {name for name in own(module) if layer_of(name) not in below}
            assert not upward, module


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


def test_nothing_imports_the_entry_points() -> None:
    for module in MODULES:
        assert not {"train", "eval", "sweeps", "benchmarks"} & imports(MODULES[module]), module


@pytest.mark.parametrize("command", plugins.names("soluscope.commands"))
def test_a_command_loads_only_modules_that_answer_at_once(command: str) -> None:
    assert not SLOW & reached(f"soluscope.commands.{command}")


@pytest.mark.parametrize("command", plugins.names("soluscope.commands"))
def test_a_command_holds_no_logic(command: str) -> None:
    tree = ast.parse(MODULES[f"soluscope.commands.{command}"].read_text())
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert defined == ["build_parser", "run"]


@pytest.mark.parametrize("script", ENTRY_POINTS)
def test_a_script_runs_one_command_and_nothing_else(script: str) -> None:
    docstring, imported, guarded = ast.parse((ROOT / script).read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert ast.unparse(imported) == "from soluscope.commands import run"
    (call,) = guarded.body
    (name,) = re.fullmatch(r"run\('(\w+)'\)", ast.unparse(call)).groups()
    assert name in plugins.names("soluscope.commands")


MAY_IMPORT = {
    "variants": {"errors", "plugins", "reading", "results", "norms", "variants"},
    "probes": {"errors", "text", "results", "data", "comparison", "hooked", "probes"},
    "controls": {"errors", "data", "controls"},
    "proxies": {"comparison", "proxies"},
    "report": {"errors", "terminal", "files", "text", "results", "wandb_client", "report"},
}
"""Allowed imports, for layers to which the order alone allows too much: a probe sees no variant, no
configuration and no training; the report sees stored rows and no model."""


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_open_sets_and_the_report_see_only_what_they_are_given(layer: str) -> None:
    for module in MODULES:
        if "." in module and layer_of(module) == layer:
            assert {layer_of(name) for name in own(module)} <= MAY_IMPORT[layer], module


@pytest.mark.parametrize("module", REPORT)
def test_report_needs_no_torch_and_no_pandas(module: str) -> None:
    assert not SLOW & reached(module)
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & {*SLOW, "pandas"}


@pytest.mark.parametrize("module", [*VARIANTS, *SOURCES])
def test_parameters_of_variants_and_sources_can_be_read_without_torch(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(MODULES[module], at_load=True)} & SLOW
    assert not SLOW & reached(module)


@pytest.mark.parametrize("package", OPEN_SETS)
def test_names_of_an_open_set_are_read_without_torch(package: str) -> None:
    assert not SLOW & reached(package)


@pytest.mark.parametrize(
    "module", ["soluscope", "soluscope.config", "soluscope.results", "soluscope.data.cache",
               "soluscope.launching.sweep", "soluscope.launching.jobs", "soluscope.launching.launch",
               "soluscope.report", "soluscope.notebook.study", *ENGINES]
)  # fmt: skip
def test_module_is_loaded_without_torch(module: str) -> None:
    assert not SLOW & reached(module)


def test_training_loads_neither_transformer_lens_nor_datasets() -> None:
    assert {"torch", "lightning", "soluscope.model"} <= reached("soluscope.training.run")
    assert not {"transformer_lens", "transformers", "datasets", "tokenizers", "pandas"} & reached(
        "soluscope.training.run"
    )


@pytest.mark.parametrize("module", [m for m in MODULES if m != "soluscope.terminal"])
def test_only_the_terminals_module_writes_to_the_terminal(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"print", "pprint", "Console", "sys.stdout.write", "sys.stderr.write"}
    assert "rich.print" not in imports(MODULES[module])


POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_what_windows_lacks(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(MODULES[module])} & POSIX_ONLY


def strings_in(path: Path) -> set[str]:
    """Return the string constants of a file, without docstrings and without values of `act_fn=`.

    An act_fn names a computation of TransformerLens's own classes. It is never one of our names.
    """
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    left_out = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    left_out |= {id(n.value) for n in nodes if isinstance(n, ast.keyword) and n.arg == "act_fn"}
    constants = (n for n in nodes if isinstance(n, ast.Constant) and id(n) not in left_out)
    return {n.value for n in constants if isinstance(n.value, str)}


@pytest.mark.parametrize("package", OPEN_SETS)
def test_open_set_has_no_list_kept_by_hand(package: str) -> None:
    members = set(plugins.names(package))
    assert len(members) >= 3
    for module, path in MODULES.items():
        assert not members <= strings_in(path), f"{module} lists {package}"


@pytest.mark.parametrize("module", [m for m in MODULES if m not in VARIANTS])
def test_no_variant_is_known_by_its_name(module: str) -> None:
    """Only docstrings contain a variant's name as a word. A string like `solu - solu_gain` is not allowed."""
    names = "|".join(plugins.names("soluscope.variants"))
    known = re.compile(rf"(?<![\w-])({names})(?!\w)")
    assert not [text for text in strings_in(MODULES[module]) if known.search(text)]


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
