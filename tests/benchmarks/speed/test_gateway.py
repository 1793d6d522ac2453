"""The gateway's figures: real processes, few requests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed.__main__ import main
from benchmarks.speed.gateway import GatewayOptions, GatewaySpeed, gateway_table, measure_gateway
from benchmarks.speed.gateway_soak import soak_gateway
from safevlm.errors import InputError
from safevlm.terminal.commandline import run


def test_the_command_measures_gateway_and_first_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gateway.json"
    with pytest.raises(SystemExit) as ended:
        run(main, ["gateway", "--rounds", "1", "--requests", "4", "--clients", "6", "--out", str(out)])
    assert ended.value.code == 0
    record = json.loads(out.read_text())
    assert record["benchmark"] == "gateway" and record["versions"]["fastapi"] and record["settings"]["clients"] == 6
    assert record["gateway_ms"][0] > record["direct_ms"][0] > 0
    assert record["overhead_ms"][0] == pytest.approx(record["gateway_ms"][0] - record["direct_ms"][0])
    assert record["guard_ms"] > 0 and {"gateway", "upstream"} <= set(record["through"])
    assert record["blocks_alone"] > 0 and record["blocks_together"] > 0
    assert list(record["first_token"]) == ["no gate", "gate, guard on ONNX Runtime", "gate, guard on llama.cpp"]
    table = capsys.readouterr().out
    assert "blocks a second" in table and "x 1.00" in table


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rounds 0"):
        GatewayOptions(rounds=0)
    with pytest.raises(InputError, match="not a guard bundle"):
        measure_gateway(tmp_path / "none", None)


def test_the_table_without_a_language_model() -> None:
    speed = GatewaySpeed(
        bundle="guard",
        image="84x84 PNG",
        direct_ms=(1.0, 2.0),
        gateway_ms=(4.0, 8.0),
        guard_ms=1.5,
        through={"gateway": 90.0, "upstream": 400.0},
        blocks_alone=9.0,
        blocks_together=20.0,
        clients=64,
        first_token={},
    )
    assert speed.overhead_ms == (3.0, 6.0) and speed.beside_guard_ms == (1.5, 4.5)
    assert not any("llama.cpp" in line for line in gateway_table(speed))


def test_honest_clients_are_served_beside_attackers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soak.json"
    with pytest.raises(SystemExit) as ended:
        run(main, ["gateway", "--soak", "0.05", "--clients", "9", "--out", str(out)])
    assert ended.value.code == 0
    record = json.loads(out.read_text())
    assert record["outcomes"]["honest 200"] > 0 and not any("500" in name for name in record["outcomes"])
    assert len(record["memory"]) == 20 and record["growth"] > 0
    assert "attackers" in capsys.readouterr().out


def test_a_soak_needs_time_and_clients(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--soak 0"):
        soak_gateway(tmp_path, 0)
