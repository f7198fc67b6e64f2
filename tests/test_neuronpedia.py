"""Neuronpedia's files: the documented folders, the columns of its tables, and the stored numbers."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from soluscope import UserError
from soluscope.neurons import neuronpedia, stored
from soluscope.neurons.schema import SIDES

RUN = "solu_ln-s0"
ID = Field(pattern=r"^[a-z0-9.-]+$")


class Table(BaseModel):
    """A table of Neuronpedia's database; the columns that have a default there may be missing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    creatorId: str


class Model(Table):
    id: str = ID
    instruct: bool
    displayName: str
    displayNameShort: str
    layers: int
    neuronsPerLayer: int
    inferenceEnabled: bool
    visibility: Literal["PUBLIC", "UNLISTED", "PRIVATE"]


class SourceRelease(Table):
    name: str
    description: str
    creatorName: str
    visibility: Literal["PUBLIC", "UNLISTED", "PRIVATE"]


class SourceSet(Table):
    modelId: str = ID
    name: str
    description: str
    type: str
    creatorName: str
    releaseName: str
    hasDashboards: bool
    allowInferenceSearch: bool
    visibility: Literal["PUBLIC", "UNLISTED", "PRIVATE"]


class Source(Table):
    id: str = Field(pattern=r"^[0-9]+-[a-z0-9.-]+$")
    modelId: str = ID
    setName: str
    hasDashboards: bool
    inferenceEnabled: bool
    dataset: str
    notes: str
    visibility: Literal["PUBLIC", "UNLISTED", "PRIVATE"]


class Neuron(Table):
    modelId: str
    layer: str
    index: str = Field(pattern=r"^[0-9]+$")
    sourceSetName: str
    maxActApprox: float
    hookName: str
    neg_str: list[str]
    neg_values: list[float]
    pos_str: list[str]
    pos_values: list[float]
    frac_nonzero: float = Field(ge=0, le=1)
    freq_hist_data_bar_heights: list[int] = []
    freq_hist_data_bar_values: list[float] = []


class Activation(Table):
    id: str
    tokens: list[str]
    index: str
    layer: str
    modelId: str
    dataSource: str
    maxValue: float
    maxValueTokenIndex: int
    minValue: float
    values: list[float]
    binMin: float | None = None
    binMax: float | None = None
    binContains: float | None = Field(default=None, ge=0, le=1)
    qualifyingTokenIndex: int


TABLES = {"model": Model, "release": SourceRelease, "sourceset": SourceSet, "source": Source}


@pytest.fixture(scope="module")
def run(tiny_neurons: Path) -> Path:
    return tiny_neurons / RUN


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "files"
    neuronpedia.export(run, folder)
    return folder


def lines_of(folder: Path, kind: type[Table]) -> list[Any]:
    paths = sorted(folder.glob("batch-*.jsonl.gz"))
    assert paths
    return [
        kind.model_validate_json(line)
        for path in paths
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]


def test_the_folders_are_those_of_the_documentation(exported: Path) -> None:
    assert sorted(path.name for path in exported.iterdir()) == [
        "tiny-solu-ln-s0",
        "tiny-solu-ln-s0-untrained",
    ]
    for source in exported.glob("*/*"):
        assert source.name in ("0-soluscope-mid", "0-soluscope-post")
        assert sorted(path.name for path in source.iterdir()) == [
            "activations", "features", "model.jsonl", "release.jsonl", "source.jsonl", "sourceset.jsonl",
        ]  # fmt: skip


@pytest.mark.parametrize("stage", SIDES)
def test_the_lines_fit_the_tables_and_refer_to_each_other(exported: Path, stage: str) -> None:
    source = exported / "tiny-solu-ln-s0" / f"0-soluscope-{stage}"
    found = {
        name: kind.model_validate(json.loads((source / f"{name}.jsonl").read_text()))
        for name, kind in TABLES.items()
    }
    model, of_source = found["model"], found["source"]
    assert of_source.modelId == found["sourceset"].modelId == model.id == source.parent.name
    assert of_source.id == source.name
    assert of_source.setName == found["sourceset"].name
    assert found["sourceset"].releaseName == found["release"].name
    neurons = lines_of(source / "features", Neuron)
    activations = lines_of(source / "activations", Activation)
    assert [each.index for each in neurons] == [str(i) for i in range(model.neuronsPerLayer)]
    for each in [*neurons, *activations]:
        assert (each.modelId, each.layer) == (model.id, of_source.id)
    assert {each.index for each in activations} <= {each.index for each in neurons}
    assert max(Counter(each.id for each in activations).values()) == 1
    assert {each.hookName for each in neurons} == {f"blocks.0.mlp.hook_{stage}"}


@pytest.mark.parametrize("stage", SIDES)
def test_the_numbers_are_the_stored_ones(run: Path, exported: Path, stage: Any) -> None:
    part = stored.read(run)
    source = exported / "tiny-solu-ln-s0" / f"0-soluscope-{stage}"
    activations = lines_of(source / "activations", Activation)
    neurons = {each.index: each for each in lines_of(source / "features", Neuron)}
    for index in (0, 3, 7):
        wanted = [each for each in part.examples(index) if each.stage == stage]
        found = [each for each in activations if each.index == str(index)]
        assert len(found) == len(wanted)
        row = part.statistics.iloc[index]
        for line, example in zip(found, wanted, strict=True):
            assert tuple(line.tokens) == example.tokens
            assert tuple(line.values) == example.activations[stage]
            assert line.dataSource == example.document
            assert line.maxValue == max(line.values) == line.values[line.maxValueTokenIndex]
            assert line.values[line.qualifyingTokenIndex] == example.activation
            if example.range is None:
                assert line.binMin is None
            else:
                low = row[f"low_{stage}"] + example.range * row[f"width_{stage}"]
                assert line.binMin == pytest.approx(low)
                assert line.binMax == pytest.approx(low + row[f"width_{stage}"])
        shares = {line.binMin: line.binContains for line in found if line.binMin is not None}
        assert sum(shares.values()) == pytest.approx(1)  # every range with a token has an example
        neuron = neurons[str(index)]
        assert neuron.maxActApprox == max(each.activation for each in wanted)
        of_neuron = part.logits[part.logits["neuron"] == index]
        highest = of_neuron[of_neuron["side"] == "highest"]
        assert neuron.pos_values == highest["logit"].tolist()
        assert neuron.pos_str == [part.vocabulary[token] for token in highest["token"]]
        assert sum(neuron.freq_hist_data_bar_heights) == part.about.n_tokens
        assert neuron.freq_hist_data_bar_values == sorted(neuron.freq_hist_data_bar_values)


def test_the_files_hold_no_time_of_their_making(exported: Path) -> None:
    for path in exported.rglob("*.gz"):
        assert path.read_bytes()[4:8] == bytes(4)  # MTIME of a gzip header


def test_nothing_is_replaced_and_nothing_is_made_up(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="exists: give a new folder"):
        neuronpedia.export(run, exported)
    empty = re.escape(str(tmp_path))
    with pytest.raises(UserError, match=f"no neurons are stored in {empty}: see"):
        neuronpedia.export(tmp_path, tmp_path / "new")
    assert not (tmp_path / "new").exists()
