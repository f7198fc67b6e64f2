"""Times of the probes on one model, and their growth with the number of tokens.

    python benchmarks/suite.py runs/demo/solu_ln-s0
    python benchmarks/suite.py runs/demo/solu_ln-s0 2000 10000 50000
    python benchmarks/suite.py --pretrained-shape 2000

The script works on a copy of the run's folder. It prints one JSON line per probe: seconds at each number
of tokens, activations and intervals included, and the exponent of their growth from the first number to
the last (1: in proportion). The first probe of a stream pays for its activations, so `tokens` includes
the time of observing the natural stream.

With --pretrained-shape, the model has random weights of SoLU-1L's shape, files as in the hub's cache and
a tokenizer of as many entries. The script then also prints the seconds that loading takes and the
process's peak memory in GB. The text is Python's standard library.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from math import log
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformer_lens import HookedTransformer, HookedTransformerConfig

from soluscope import plugins
from soluscope.config import EvalConfig, PretrainedConfig
from soluscope.evaluation.suite import evaluate, evaluate_pretrained
from soluscope.hooked.pretrained import load_pretrained

SHAPE = {
    "n_layers": 1, "d_model": 512, "d_mlp": 2048, "d_head": 64, "n_heads": 8, "n_ctx": 1024, "d_vocab": 48262,
    "act_fn": "solu_ln", "attn_only": False, "normalization": "LN", "final_rms": False, "ln_eps": 1e-5,
}  # fmt: skip
"""The settings of SoLU-1L's config.json that define the computation."""

Marks = list[tuple[str, float]]


def main(words: list[str]) -> None:
    pretrained = words[0] == "--pretrained-shape"
    sizes = [int(word) for word in words[1:]] or [2000, 10_000, 50_000]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if pretrained:
            write_model(folder / "model")
            begin = time.perf_counter()
            load_pretrained(str(folder / "model"))
            print(json.dumps({"load": round(time.perf_counter() - begin, 2)}), flush=True)
            taken = {n: pretrained_times(folder, n) for n in sizes}
        else:
            taken = {n: times(Path(words[0]), folder / str(n), n) for n in sizes}
    for name in [*taken[sizes[0]], "all"]:
        seconds = {n: round(each.get(name, sum(each.values())), 2) for n, each in taken.items()}
        line: dict[str, object] = {"probe": name, "seconds": seconds}
        if len(sizes) > 1:
            first, last = (max(seconds[sizes[i]], 1e-3) for i in (0, -1))
            line["exponent"] = round(log(last / first) / log(sizes[-1] / sizes[0]), 2)
        print(json.dumps(line))
    print(json.dumps({"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))


def times(run_dir: Path, scratch: Path, n_tokens: int) -> dict[str, float]:
    """Return the seconds of each probe and of `tokens`, without controls and losses."""
    marks: Marks = []
    study = scratch / run_dir.parent.name
    copy = study / run_dir.name
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("probes", "checkpoints"))
    for name in ("data.json", "tokenizer.json"):
        shutil.copy(run_dir.parent / name, study / name)
    config = EvalConfig(n_tokens=n_tokens, n_loss_tokens=1000)
    evaluate(copy, config, lambda text: None, marking(marks))
    wanted = {"tokens", *plugins.names("soluscope.probes")}
    return {name: taken for name, taken in between(marks).items() if name in wanted}


def pretrained_times(scratch: Path, n_tokens: int) -> dict[str, float]:
    """Return the seconds of each probe, of `tokens` and of `loss`, without controls."""
    marks: Marks = []
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begin:.1f} s: {text}", file=sys.stderr, flush=True)

    config = PretrainedConfig(
        n_tokens=n_tokens, n_loss_tokens=n_tokens, data="stdlib", runs_dir=str(scratch / "runs")
    )
    evaluate_pretrained(str(scratch / "model"), config, say, marking(marks))
    return between(marks)


def marking(marks: Marks) -> Callable[[int, int, str], None]:
    """Return a function that notes the time at which each probe begins."""
    return lambda done, of, name: marks.append((name, time.perf_counter()))


def between(marks: Marks) -> dict[str, float]:
    """Return the seconds from the beginning of each probe to the next one's."""
    ends = [*marks, ("", time.perf_counter())]
    return {name: end - begin for (name, begin), (_, end) in pairwise(ends)}


def write_model(folder: Path) -> None:
    """Write random weights of SoLU-1L's shape, in the layout of its family's repositories."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    write_tokenizer(folder)
    sizes = {key: SHAPE[key] for key in SHAPE if key not in ("normalization", "ln_eps")}
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(**sizes, normalization_type="LN", initializer_range=0.02)
    )
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(state, folder / "model.safetensors")


def write_tokenizer(folder: Path) -> None:
    """Write a BPE tokenizer of the standard library, filled up to d_vocab with made-up words."""
    source = plugins.pick("soluscope.data.sources", "stdlib")
    texts = (document.text for document in source.documents(source.params(max_mb=4)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|EOS|>", "<|BOS|>", "<|PAD|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    n_left = int(str(SHAPE["d_vocab"])) - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<made-up {i}>" for i in range(n_left)])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("eos_token", "bos_token", "pad_token"), special, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main(sys.argv[1:])
