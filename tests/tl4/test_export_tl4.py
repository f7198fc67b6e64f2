"""Exports loaded by TransformerLens 4.x from a hub on loopback, with the code of their cards.

Run as a script with 3.9, this file makes the exports. The tests run in the environment with 4.x.

    python tests/tl4/test_export_tl4.py FOLDER
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soluscope import plugins

ROOT = Path(__file__).parents[2]
WITH_39 = Path(os.environ.get("PYTHON_WITH_39", ROOT / ".venv" / "bin" / "python"))
pytestmark = [
    pytest.mark.skipif(
        int(version("transformer-lens").split(".")[0]) < 4,
        reason="needs TransformerLens 4.x: make test-tl4",
    ),
    pytest.mark.skipif(
        not WITH_39.is_file(), reason=f"exports are made with 3.9, and {WITH_39} does not exist"
    ),
]

EXPRESSED = {"solu_ln": ("mid.eps=1e-5",), "solu": (), "gelu": ()}
"""Variants that 4.x can compute, each with the settings that it needs."""
OUR_OWN = {v: () for v in plugins.names("soluscope.variants") if v not in EXPRESSED}
TOKENS = torch.randint(512, (3, 20), generator=torch.Generator().manual_seed(5))
TEXT = "def f(x): return 12 + <|BOS|>"


def write(folder: Path) -> None:
    """Write exports to folder/out and the results of 3.9 on the same runs to `folder`; needs 3.9."""
    from conftest import tiny_config, train_silently

    import soluscope
    from soluscope.export import export

    for variant, words in (EXPRESSED | OUR_OWN).items():
        run_dir = train_silently(
            tiny_config(folder / "runs", "study=tl4", f"variant={variant}", *words)
        )
        export(run_dir, folder / "out" / variant)
        model = soluscope.load(run_dir)
        logits, cache = model.run_with_cache(TOKENS)
        np.savez(
            folder / f"{variant}.npz", logits=logits.detach(), tokens=model.to_tokens(TEXT)[0],
            post=cache["blocks.0.mlp.hook_post"].detach(),
        )  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    search_path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests")))
    done = subprocess.run(
        [WITH_39, __file__, folder],
        env={**os.environ, "PYTHONPATH": search_path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def there(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Call functions of this file in a process that can reach only a local hub with the exports."""
    from _hub import Hub

    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        for folder in (exports / "out").iterdir():
            hub.put(
                f"user/{folder.name}", {path.name: path.read_bytes() for path in folder.iterdir()}
            )
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            patch.delenv(name)
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        patch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *words: pool.submit(function, *words).result()


def run_there(code: str) -> dict[str, Any]:
    """Return the results of the model that the card's code loads, or its error."""
    names: dict[str, Any] = {}
    try:
        exec(code, names)
    except (ValueError, AssertionError) as error:
        return {"error": str(error)}
    model = names["model"]
    with torch.no_grad():
        logits, cache = model.run_with_cache(TOKENS)
    return {
        "logits": logits.numpy(), "post": cache["blocks.0.mlp.hook_post"].numpy(),
        "tokens": model.to_tokens(TEXT)[0].numpy(),
    }  # fmt: skip


def code_of(exports: Path, variant: str) -> str:
    """Return the last code block of a card, with the model's name on the hub."""
    card = (exports / "out" / variant / "README.md").read_text()
    code: str = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[-1]
    assert "boot_tl_legacy" in code
    return code.replace("user/name", f"user/{variant}")


@pytest.mark.parametrize("variant", EXPRESSED)
def test_the_code_of_the_card_loads_the_run(variant, exports, there):
    found, wanted = there(run_there, code_of(exports, variant)), np.load(exports / f"{variant}.npz")
    assert "error" not in found, found
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("variant", OUR_OWN)
def test_a_model_of_our_own_is_refused_by_name(variant, exports, there):
    code = code_of(exports, "solu").replace("user/solu", f"user/{variant}")
    assert f"soluscope:{variant}" in there(run_there, code)["error"]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
