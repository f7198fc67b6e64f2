"""Probes and exact ablations on another device: nothing leaves it on the way, and the numbers are the CPU's.

An emulated device refuses what CUDA refuses. It computes with the CPU's kernels, so its numbers must be equal. A
real CUDA device has its own kernels, so its numbers are compared to 1e-5, where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from _device import DEVICE, emulated_device
from test_convert import hooked_for
from test_every_probe import stream_for

from soluscope import plugins
from soluscope.data.streams import PAIRS, Stream
from soluscope.evaluation.one_run import token_values
from soluscope.evaluation.summaries import about_run, token_table
from soluscope.hooked.ablation import Ablation, disjoint_mean, loss_at_gain
from soluscope.hooked.activations import HookedRun, observe
from soluscope.probes import Measured

PROBES = plugins.names("soluscope.probes")
N_ROWS = 24

Numbers = dict[str, Any]


@cache
def model_and_stream(model: str, pairs: bool) -> tuple[Any, Stream]:
    """Return a planted model, or an untrained model of a variant, and a few rows of text for it; both in fp64."""
    if model in plugins.names("soluscope.variants"):
        probe = "scale_patching" if pairs else "engagement"
        return hooked_for(model)[1], stream_for(plugins.pick("soluscope.probes", probe))
    planted = plugins.pick("soluscope.controls", model).build()
    stream = planted.streams["pairs" if pairs else "natural"]
    rows = {name: getattr(stream, name)[:N_ROWS] for name in ("tokens", "string", "keep")}
    return planted.model, dataclasses.replace(stream, **rows)


def observed(model: str, pairs: bool, device: torch.device) -> HookedRun:
    """Return the activations of a model on a device."""
    hooked, stream = model_and_stream(model, pairs)
    before = hooked.cfg.device
    try:
        torch.nn.Module.to(hooked, device)
        hooked.cfg.device = device
        return observe(hooked, stream)
    finally:
        torch.nn.Module.to(hooked, "cpu")
        hooked.cfg.device = before


def numbers(run: HookedRun, measured: Measured) -> Numbers:
    """Return all numbers of a probe, by name."""
    table = token_table(run, measured)
    found: Numbers = {name: table[name].to_numpy() for name in table}
    for each in measured.estimates:
        name = f"{each.quantity}, {each.group}, {each.x}"
        found[name] = each.value(each.sums.sum(0, keepdims=True))
        found[f"{name}, sums"] = each.sums
    return found | {f"neuron {name}": column.numpy() for name, column in measured.neurons.items()}


def probe_numbers(name: str, model: str, device: torch.device) -> Numbers:
    probe = plugins.pick("soluscope.probes", name)
    run = observed(model, probe.streams[0].startswith(PAIRS), device)
    assert run.device.type == device.type
    return numbers(run, probe.measure(run))


def every_edit(run: HookedRun) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the results of the whole ablation engine at some tokens of a run, by name."""
    tokens = (run.target >= 0).nonzero().squeeze(-1)[:6]
    for final_norm in ("live", "frozen"):
        ablation = Ablation(run, final_norm)
        values = {f"{stage}": getattr(ablation, stage)(tokens) for stage in ("post", "mid", "pre")}
        values |= {
            f"{stage} within 1e-6": getattr(ablation, stage)(tokens, tolerance=1e-6)
            for stage in ("post", "mid", "pre")
        }
        values["resampled"] = ablation.resample(tokens, 2, 0, tolerance=1e-6)
        values["gradient"] = ablation.gradient(tokens)
        values["entropy"] = ablation.entropy(tokens)
        values["target's logit"] = ablation.target_logit(tokens)
        values |= {
            f"bound {name}": part for name, part in ablation.bounds(tokens)._asdict().items()
        }
        for query in (ablation.top(tokens, 20), ablation.above(tokens, 1e-3)):
            values |= {
                f"query {len(values)} {name}": torch.as_tensor(part)
                for name, part in query._asdict().items()
            }
        gains = run.gain[:, None] * run.gain.new_tensor([0.5, 2.0])
        values["loss at gains"] = loss_at_gain(run, gains, final_norm)
        yield from ((f"{name}, {final_norm}", value) for name, value in values.items())
    yield "mean of others", disjoint_mean(run, "mid")


def engine_numbers(model: str, device: torch.device) -> Numbers:
    run = observed(model, False, device)
    return {name: value.cpu().numpy() for name, value in every_edit(run)}


def compare(
    compute: Callable[[torch.device], Numbers],
    device: torch.device,
    context: AbstractContextManager[Any],
    rtol: float,
) -> None:
    """Compare all numbers of a device with those of the CPU."""
    wanted = compute(torch.device("cpu"))
    with context:
        found = compute(device)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        size = np.nanmax(np.abs(value), initial=0.0) if value.dtype.kind == "f" else 0.0
        np.testing.assert_allclose(
            found[name], value, rtol=rtol, atol=rtol * size, equal_nan=True, err_msg=name
        )


@pytest.mark.parametrize("model", ["smear_shared", "solu_gain"])
@pytest.mark.parametrize("name", PROBES)
def test_a_probe_keeps_to_the_device_and_gives_the_numbers_of_the_cpu(
    name: str, model: str
) -> None:
    compare(lambda device: probe_numbers(name, model, device), DEVICE, emulated_device(), rtol=0.0)


@pytest.mark.parametrize("model", ["smear_shared", "solu_ln"])
def test_exact_ablation_keeps_to_the_device_and_gives_the_numbers_of_the_cpu(model: str) -> None:
    compare(lambda device: engine_numbers(model, device), DEVICE, emulated_device(), rtol=0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
@pytest.mark.parametrize("model", ["smear_shared", "solu_ln"])
@pytest.mark.parametrize("name", [*PROBES, "exact ablation"])
def test_a_gpu_gives_the_numbers_of_the_cpu_to_a_relative_1e_5(name: str, model: str) -> None:
    def compute(device: torch.device) -> Numbers:
        if name == "exact ablation":
            return engine_numbers(model, device)
        return probe_numbers(name, model, device)

    compare(compute, torch.device("cuda"), nullcontext(), rtol=1e-5)


def test_the_token_view_of_a_device_is_that_of_the_cpu() -> None:
    hooked, stream = model_and_stream("solu_ln", pairs=False)
    vocab = tuple(f"t{i}" for i in range(hooked.cfg.d_vocab))
    with emulated_device():
        run = dataclasses.replace(observed("solu_ln", False, DEVICE), vocab=vocab)
        found = token_values(run, about_run(hooked.facts))
    run = dataclasses.replace(observe(hooked, stream), vocab=vocab)
    wanted = token_values(run, about_run(hooked.facts))
    assert repr(found) == repr(wanted)  # nan equals nan
    assert len(found) == 3 * stream.tokens.shape[1]


def test_the_emulated_device_refuses_what_cuda_refuses() -> None:
    here, generator = torch.ones(3), torch.Generator().manual_seed(0)
    with emulated_device():
        there = torch.arange(3, device=DEVICE).double()
        refused: list[Callable[[], object]] = [
            lambda: there + here,
            lambda: torch.where(there > 0, there, here.double()),
            lambda: here[there.long()],
            lambda: there[here.long()],
            lambda: torch.cat([there, here.double()]),
            lambda: torch.mm(here[None], here[:, None], out=there[:1, None]),
            lambda: there.index_add_(0, here.long(), there),
            lambda: torch.rand(3, generator=generator, device=DEVICE),
        ]
        for operation in refused:
            with pytest.raises(RuntimeError, match="expected a"):
                operation()
        for conversion in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="convert"):
                conversion()
        assert type(there.cpu()) is type(there.to("cpu")) is torch.Tensor
        assert (there * torch.tensor(2.0)).tolist() == [
            0,
            2,
            4,
        ]  # no dimension: allowed on CUDA too
        made = [
            there.new_zeros(2),
            torch.zeros_like(there),
            there.new_tensor([1.0]),
            here.to(there),
        ]
        made += [torch.tensor([1.0], device=DEVICE), torch.as_tensor(0.0, device=DEVICE), there[1:]]
        assert {tensor.device for tensor in made} == {DEVICE}
