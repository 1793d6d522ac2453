"""Rounding real weights: the table, who fails, and that our own steps lose less."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.real.checkpoint import write_real_checkpoint
from benchmarks.real.names import CHECKPOINT, HELD_OUT
from benchmarks.real.packages import ENVIRONMENT, WEIGHTS
from benchmarks.speed.__main__ import main
from benchmarks.speed.divergence import BEGINNINGS, Reference
from benchmarks.speed.quantize import PEER_VARIABLES
from benchmarks.speed.quantize_real import measure_real
from benchmarks.speed.quantize_real_cases import (
    INT8_PEERS,
    INT8_WAYS,
    REAL_PEERS,
    WAYS,
    RealCase,
    RealRow,
    find_peers,
    real_table,
)
from quantize.gptq import main as gptq
from safevlm.checkpoint.checkpoint import open_checkpoint
from safevlm.errors import InputError
from safevlm.network.loading import load_safe_vlm
from tests.benchmarks.real.tiny_gguf import install, random_llama, write_gguf

ROOT = Path(__file__).parents[3]
CASE = RealCase(weights="smollm2", bits=(8, 3), rows=4, group_size=64, windows=2, length=96)
NOWHERE = Path("/nowhere/python")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    write_gguf(random_llama(), folder / "tiny.gguf")
    weights = install(folder / "tiny.gguf", folder / "env")
    write_real_checkpoint(weights, folder / "out", environment=folder / "env", rows=12, max_new_tokens=24)
    return folder / "out"


def test_fewer_bits_lose_more_and_a_peer_that_fails_is_a_row(subject: Path) -> None:
    seen: list[RealRow] = []
    tokens, rows = measure_real(
        CASE, subject, ("now", "gptaq"), peers_python=Path(sys.executable), variables=PEER_VARIABLES, done=seen.append
    )
    assert tuple(seen) == rows and [(row.bits, row.peer) for row in rows] == [
        (8, "now"), (8, "gptaq"), (3, "now"), (3, "gptaq"),
    ]  # fmt: skip
    eight, failed, three, _ = rows
    assert tokens > 4 * 40
    for row in (eight, three):
        assert row.problem is None, row.problem
        assert tuple(row.kl) == BEGINNINGS and row.cpu_seconds and row.peak_rss_bytes
    assert 0 < eight.kl["calibrated"] < three.kl["calibrated"] / 20
    assert eight.same_token["raw"] > three.same_token["raw"]
    assert failed.problem is not None and "No module named 'gptqmodel'" in failed.problem


def test_int8_rounds_inputs_of_whoever_it_is(subject: Path) -> None:
    case = replace(CASE, int8=True)
    _, rows = measure_real(
        case, subject, ("before", "now", "llm-compressor"), peers_python=Path(sys.executable), variables=PEER_VARIABLES
    )
    before, now, failed = rows
    assert {row.bits for row in rows} == {8} and now.problem is None and before.problem is None
    assert tuple(now.kl) == BEGINNINGS and 0 < now.kl["calibrated"] < 0.1
    assert failed.problem is not None and "No module named 'llmcompressor'" in failed.problem
    lines = real_table(case, "a note", 1234, rows)
    assert "a scale a row, inputs a token" in lines[0] and lines[3].split()[:2] == ["int8", "before"]
    text = (subject / HELD_OUT).read_text(encoding="utf-8")
    reference = Reference(subject / CHECKPOINT, text, windows=2, length=64, seed=0)
    model = load_safe_vlm(open_checkpoint(subject / CHECKPOINT, tap="language_model"))
    own = {name: value for name, value in model.core.language_model.named_parameters() if "layers." in name}
    for rounds_inputs, low, high in ((False, -1e-6, 1e-6), (True, 1e-6, 0.1)):
        found = reference.of_weights(own, rounds_inputs=rounds_inputs)
        assert all(low < each.kl < high for each in found.values())


def test_the_16_bit_model_has_no_divergence_from_itself(subject: Path) -> None:
    text = (subject / HELD_OUT).read_text(encoding="utf-8")
    reference = Reference(subject / CHECKPOINT, text, windows=2, length=64, seed=0)
    for found in reference.of_artifact(subject / CHECKPOINT).values():
        assert abs(found.kl) < 1e-6 and found.same_token == 1
    model = load_safe_vlm(open_checkpoint(subject / CHECKPOINT, tap="language_model"))
    name = "layers.0.mlp.down_proj.weight"
    weight = dict(model.core.language_model.named_parameters())[name]
    other = reference.of_weights({name: torch.zeros_like(weight)})
    assert min(found.kl for found in other.values()) > 1e-3
    raw, calibrated = reference.windows["raw"][0], reference.windows["calibrated"][0]
    assert raw.first == 0 and len(raw.ids) == 64
    assert calibrated.first > 0 and calibrated.ids[calibrated.first :] == raw.ids
    assert Reference(subject / CHECKPOINT, text, windows=2, length=64, seed=1).windows["raw"][0] != raw
    with pytest.raises(InputError, match="Give fewer windows"):
        Reference(subject / CHECKPOINT, "Too short.", windows=2, length=64, seed=0)


def test_the_table_has_every_figure_and_every_reason() -> None:
    figures = {"calibrated": 0.4, "raw": 0.5, "other": 0.6}
    rows = (
        RealRow(
            peer="now", bits=3, version="1", kl=figures, same_token=figures, seconds=90.4, cpu_seconds=80.0,
            peak_rss_bytes=2**30,
        ),
        RealRow(peer="foem", bits=3, problem="it broke"),
    )  # fmt: skip
    lines = real_table(replace(CASE, seed=7), "a note", 1234, rows)
    assert "1234 tokens" in lines[0] and "seed 7" in lines[0] and lines[1] == "note: a note"
    assert lines[3].split() == ["3", "now", "0.4000", "0.5000", "0.6000", "40.0", "90", "80", "1024"]
    assert lines[4].split(maxsplit=2) == ["3", "foem", "not measured: it broke"]


def test_names_and_ways() -> None:
    assert find_peers(()) == (*WAYS, *REAL_PEERS)
    assert find_peers(("foem", "now")) == ("now", "foem")
    assert find_peers((), int8=True) == (*INT8_WAYS, *INT8_PEERS) == ("before", "now", "llm-compressor")
    with pytest.raises(
        InputError, match=r"--who autoround does not go with --int8\. Give names out of before, now, llm"
    ):
        find_peers(("autoround",), int8=True)
    assert replace(CASE, minutes=2.5).options("tuned") == ("--time", "2.5")
    with pytest.raises(InputError, match=r"--who awq is unknown\. Give names out of before, now, tuned, gptqmodel"):
        find_peers(("awq",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--real --case llama", "--case does not go with --real"),
        ("--rows 12", "--rows needs --real"),
        ("--int8", "--int8 needs --real"),
        ("--real --int8 --bits 8", "--bits does not go with --int8"),
        ("--real --int8 --who tuned", "--who tuned does not go with --int8"),
        ("--real --who now --subject /nowhere", "there is no checkpoint/"),
        ("--real --who foem --peers /nowhere/python", "/nowhere/python is missing. Run make peers"),
        ("--real --who awq", "--who awq is unknown"),
        ("--real --out /nowhere/at/all.json", "there is no folder /nowhere/at"),
    ],
)
def test_bad_input_is_said_before_anything_runs(arguments: str, message: str) -> None:
    ran = CliRunner().invoke(main, ["quantize", *arguments.split()])
    assert isinstance(ran.exception, InputError) and message in str(ran.exception)


def test_weights_that_are_not_installed_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(main, ["quantize", "--real", "--who", "now", "--weights", "gemma3"])
    assert isinstance(ran.exception, InputError) and "Gemma-3-270M is not installed" in str(ran.exception)


@pytest.mark.skipif("--sweeps" not in {name for option in gptq.params for name in option.opts}, reason="no --sweeps")
def test_what_was_added_after_gptq_loses_less_on_real_weights(tmp_path: Path) -> None:
    environment = ROOT / ENVIRONMENT
    if not environment.is_dir() and not os.environ.get("CI"):
        pytest.skip("no .venv-weights; make peers")
    folder = tmp_path / "subject"
    write_real_checkpoint(WEIGHTS["smollm2"], folder, environment=environment, layers=2, rows=16, max_new_tokens=32)
    case = replace(CASE, bits=(3,), rows=16, windows=6, length=128)
    _, rows = measure_real(case, folder, ("before", "now"), peers_python=NOWHERE, variables={})
    before, now = rows
    assert before.problem is None and now.problem is None, (before.problem, now.problem)
    assert now.kl["calibrated"] < before.kl["calibrated"] and now.kl["raw"] < before.kl["raw"]
