"""Peak memory of a probe against the number of tokens, read in blocks and as one run.

    python benchmarks/memory.py
    python benchmarks/memory.py engagement 20000 80000 320000

The model has random weights (d_model 64, d_mlp 512, d_vocab 2048), and the text is random tokens in rows of 128
and documents of 512. Each measurement is a separate process and includes the table of values per token and the
summaries with 200 draws. The script prints one JSON line for each: the MB that the process has before the text is
read, and the largest number of MB beyond these.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from soluscope import plugins
from soluscope.data.streams import Stream
from soluscope.evaluation.summaries import summarise, token_table
from soluscope.hooked.activations import HookedRun, observe, observe_blocks
from soluscope.probes import Probe
from soluscope.probes._per_token import PerToken
from soluscope.results import Measurement

WIDTH, DOCUMENT, D_VOCAB = 128, 512, 2048
PROBES = ("engagement", "gain_variation")
SIZES = ("20000", "80000", "320000")
LARGEST_RUN = 100_000
"""Largest number of tokens that is also read as one run, which takes 4 GB at this size."""


def main(words: list[str]) -> None:
    names = [word for word in words if not word.isdigit()] or PROBES
    sizes = [word for word in words if word.isdigit()] or SIZES
    for name in names:
        for how in ("in blocks", "as one run"):
            for n_tokens in sizes:
                if how == "as one run" and int(n_tokens) > LARGEST_RUN:
                    continue
                subprocess.run([sys.executable, __file__, "--one", name, how, n_tokens], check=True)


def measure(name: str, how: str, n_tokens: int) -> None:
    """Print the peak memory of one measurement; call this once per process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=64, n_ctx=WIDTH, d_head=32, n_heads=2, d_mlp=512, d_vocab=D_VOCAB,
            act_fn="solu_ln", normalization_type="LN", device="cpu", seed=0,
        )
    ).eval()  # fmt: skip
    probe: Probe = plugins.pick("soluscope.probes", name)
    assert isinstance(probe.measure, PerToken), f"{name} needs the whole run"
    base = Measurement(study="", run="", probe=name, quantity="", value=None, unit="")
    stream = text_of(n_tokens)
    next(observe_blocks(model, text_of(WIDTH)))  # libraries and their buffers
    begin, before = time.perf_counter(), memory("VmRSS")
    blocks: Iterator[HookedRun] = observe_blocks(model, stream)
    if how == "as one run":
        blocks = iter([observe(model, stream)])
    text, measured = probe.measure.of_blocks(blocks)
    table = token_table(text, measured)
    rows = list(summarise(probe, table, measured.estimates, base, n_draws=200, seed=0))
    line = {
        "probe": name, "how": how, "n_tokens": len(text.pos), "mb_before": round(before),
        "mb_added": round(memory("VmHWM") - before), "seconds": round(time.perf_counter() - begin, 1),
        "n_numbers": len(rows),
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def text_of(n_tokens: int) -> Stream:
    """Return rows of random tokens, each after BOS."""
    n_rows = max(1, n_tokens // WIDTH)
    tokens = torch.randint(1, D_VOCAB, (n_rows, WIDTH), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    string = (torch.arange(n_rows) * WIDTH // DOCUMENT)[:, None].expand(tokens.shape)
    return Stream("natural", tokens, string, torch.ones_like(tokens, dtype=torch.bool), bos=0)


def memory(field: str) -> float:
    """Return this process's resident MB: now (VmRSS), or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(dict(line.split(":", 1) for line in lines)[field].split()[0]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main(sys.argv[1:])
