"""Students: models that the ordinary training code trains on the text of a planted task.

The text is drawn from a planted model of `controls/`, one character for each of its tokens, so it is prepared,
trained on and compared as any other text. A student begins with random weights, or near the planted ones.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from conftest import train_silently
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from soluscope import plugins
from soluscope.config import Config, load_config
from soluscope.controls import _shell
from soluscope.data.cache import prepare
from soluscope.evaluation import suite
from soluscope.files import checksum
from soluscope.model import LanguageModel
from soluscope.norms import StaticNorm
from soluscope.results import Record, read
from soluscope.runs.folder import Run
from soluscope.runs.weights import save_weights
from soluscope.training.static_gain import set_gain

CTX, WIDTH = 33, 32
"""Tokens of a row, BOS included, and of a document, EOS included: a row is one document."""
ANCHOR = 100.0
"""Length of the anchor as a multiple of the MLP's longest output: fp32 leaves no room for the controls' 10,000."""
TINY = 1e-12
"""A learning rate at which nothing moves."""


class Task:
    """The text of one planted model, and a student's weights that equal the planted ones."""

    def __init__(self, control: str, folder: Path, n_documents: int = 6000) -> None:
        planted = plugins.pick("soluscope.controls", control).build().model
        mlp = planted.blocks[0].mlp
        self.folder, self.name, self.eps = folder, control, float(mlp.ln.eps)
        with torch.no_grad():
            _, cache = planted.run_with_cache(torch.arange(planted.cfg.d_vocab)[:, None])
        self.pre = cache["pre", 0][:, 0]  # [token d_mlp]
        n = planted.cfg.d_vocab
        # The planted model's W_out writes each logit on a separate dimension.
        self.effect = mlp.W_out.detach()[:, n : 2 * n]  # [d_mlp token]
        self.d_vocab, self.d_mlp = n + 1, self.pre.shape[1]
        folder.mkdir(parents=True)
        self._write_tokenizer()
        self._write_text(n_documents)

    @property
    def kappa(self) -> float:
        return self.eps * self.d_mlp**2

    def _characters(self) -> list[str]:
        return [chr(0x4E00 + token) for token in range(self.d_vocab)]

    def _write_tokenizer(self) -> None:
        special = {"<|BOS|>": 0, "<|EOS|>": self.d_vocab - 1}
        plain = {c: i for i, c in enumerate(self._characters()) if i not in special.values()}
        tokenizer = Tokenizer(models.WordLevel(special | plain, unk_token="<|BOS|>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.add_special_tokens(list(special))
        tokenizer.save(str(self.folder / "tokenizer.json"))
        named = {"bos_token": "<|BOS|>", "eos_token": "<|EOS|>", "pad_token": "<|EOS|>"}
        (self.folder / "tokenizer_config.json").write_text(json.dumps(named))

    def _write_text(self, n_documents: int) -> None:
        logits = _shell.post(self.pre, self.eps) @ self.effect
        chances = logits[:, 1:].softmax(-1)  # [token token - 1]: BOS never follows
        random = torch.Generator().manual_seed(0)
        tokens = torch.zeros(n_documents, WIDTH, dtype=torch.long)
        for pos in range(1, WIDTH):
            drawn = torch.multinomial(chances[tokens[:, pos - 1]], 1, generator=random)
            tokens[:, pos] = 1 + drawn[:, 0]
        characters = self._characters()
        with (self.folder / "text.jsonl").open("w", encoding="utf8") as file:
            for row in tokens[:, 1:].tolist():
                file.write(json.dumps({"text": "".join(characters[t] for t in row)}) + "\n")

    def config(self, *words: str) -> Config:
        """Return the configuration of a student."""
        shape = f"model.d_model={2 * self.d_vocab + 2}", f"model.d_mlp={self.d_mlp}"
        return load_config(
            [
                "size=tiny", "data=files", f"corpus.paths=[{self.folder}/text.jsonl]",
                f"tokens.tokenizer={self.folder}/tokenizer.json", "tokens.select_share=.1",
                "tokens.report_share=.1", f"tokens.cache_dir={self.folder}/.tokens",
                f"runs_dir={self.folder}", "model.n_heads=1", f"model.ctx={CTX}", *shape,
                "train.threads=1", "train.precision=fp32", "wandb=off", *words,
            ]
        )  # fmt: skip

    def plant(self, seeds: Sequence[int], noise: float, *arm: str) -> str:
        """Make finished runs of an arm whose weights are near the planted ones, one for each seed.

        Args:
            seeds: seeds of the noise.
            noise: standard deviation of the noise on pre-activations, and on W_out as a share of its rms.
            arm: the words of the arm.

        Returns:
            The folder of these runs, with {seed} in place of the seed, for train.init_from.
        """
        words = ("study=planted", *arm, "train.steps=1", "train.warmup_steps=0")
        run = Run(train_silently(self.config(*words)))
        for seed in seeds:
            copy = Run(run.dir.with_name(f"{run.dir.name}-near{seed}"))
            shutil.copytree(run.dir, copy.dir)
            model = copy.load_model()
            self._set_weights(model, noise, seed)
            norm = model.mlp(0).ln
            if isinstance(norm, StaticNorm):  # measured again, on the planted activations
                norm.gain.fill_(math.nan)
                set_gain(model, run.config, prepare(run.config))
            save_weights(copy.weights, model)
            done = json.loads((copy.dir / "done.json").read_text())
            about = {
                "weights_sha256": checksum(copy.weights),
                "weights_bytes": copy.weights.stat().st_size,
            }
            (copy.dir / "done.json").write_text(json.dumps(done | about))
        return f"{run.dir}-near{{seed}}"

    @torch.no_grad()
    def _set_weights(self, model: LanguageModel, noise: float, seed: int) -> None:
        """Give a model the planted weights with noise; attention writes nothing, and an anchor holds ln_final."""
        n, random = self.d_vocab, torch.Generator().manual_seed(seed)
        pre = torch.cat([self.pre, self.pre[:1]]).float()  # EOS has the code of BOS
        effect = torch.nn.functional.pad(self.effect, (0, 1)).float()
        pre += noise * torch.randn(pre.shape, generator=random)
        spread = noise * effect.square().mean().sqrt()
        effect += spread * torch.randn(effect.shape, generator=random)
        anchor = ANCHOR * float((_shell.post(self.pre, self.eps) @ self.effect).norm(dim=-1).max())
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name.endswith(".w") else 0.0)
        model.embed.W_E[:, :n] = torch.eye(n)
        block, mlp = cast(Any, model.blocks[0]), model.mlp(0)
        seen = block.ln2(model.embed.W_E)
        # The default driver, gelsy, sometimes takes these tied rows for dependent, and then drops a third of them.
        mlp.W_in.copy_(torch.linalg.lstsq(seen, pre, driver="gels").solution)
        torch.testing.assert_close(seen @ mlp.W_in, pre, rtol=0, atol=1e-4)
        mlp.W_out[:, n : 2 * n] = effect
        mlp.b_out[-2], mlp.b_out[-1] = anchor / 2**0.5, -anchor / 2**0.5
        scale = (model.embed.W_E[1] + mlp.b_out).std(correction=0)
        model.unembed.W_U[n : 2 * n] = scale * torch.eye(n)
        model.unembed.b_U[0] = _shell.BOS_LOGIT
        model.unembed.b_U[-1] = 2.5  # EOS is about one token in 32

    def compared(self, study: str, config: suite.EvalConfig) -> list[Record]:
        """Evaluate a study in this process, and return its records."""
        path = suite.evaluate(self.folder / study, config, lambda text: None, lambda *args: None)
        return read(path)

    def train(self, *words: str) -> Path:
        return train_silently(self.config(*words))
