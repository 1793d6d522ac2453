"""Every query of the Grafana dashboard asks for what the gateway counts, as Prometheus can answer it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from runtimes.gateway.serving.metrics import Metrics
from tests.deploy.parts import DEPLOY, ROOT, tool

BOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
TARGETS = {"job", "instance"}
"""Labels that Prometheus adds."""


def series() -> dict[str, tuple[MetricWrapperBase, set[str]]]:
    """Return the names that the gateway exposes, each with its metric and labels."""
    found = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, MetricWrapperBase):
            name, labels = metric.describe()[0].name, set(metric._labelnames) | TARGETS
            if isinstance(metric, Histogram):
                found |= {f"{name}_{end}": (metric, labels) for end in ("sum", "count")}
                found[f"{name}_bucket"] = (metric, labels | {"le"})
            else:
                found[f"{name}_total" if isinstance(metric, Counter) else name] = (metric, labels)
    return found


def queries() -> list[str]:
    """Return the dashboard's queries, with Grafana's own variables put in."""
    panels = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    variables = [each["query"]["query"] for each in BOARD["templating"]["list"] if each["type"] == "query"]
    asked = [re.fullmatch(r"label_values\((.*), (\w+)\)", each) for each in variables]
    assert all(each is not None and each[2] in TARGETS for each in asked)
    return [each.replace("$__rate_interval", "5m") for each in [*panels, *(each[1] for each in asked if each)]]


@pytest.fixture(scope="module")
def selected() -> list[list[dict[str, Any]]]:
    """What each query selects, as a parser of the language finds."""
    command = [tool("python"), str(ROOT / "tests" / "peers" / "deploy.py"), "promql"]
    done = subprocess.run(command, input=json.dumps(queries()), capture_output=True, text=True, check=True, timeout=600)
    found: list[list[dict[str, Any]]] = json.loads(done.stdout)
    assert all(found)
    return found


def test_every_query_names_a_metric_that_there_is_and_its_labels(selected: list[list[dict[str, Any]]]) -> None:
    exposed = series()
    for query, found in zip(queries(), selected, strict=True):
        for each in found:
            assert each["name"] in exposed, query
            metric, labels = exposed[each["name"]]
            assert set(each["labels"]) <= labels, query
            counted = not isinstance(metric, Gauge)
            assert ("rate" in each["around"]) == counted, query
            assert ("histogram_quantile" in each["around"]) == ("le" in labels), query
            assert "le" not in labels or "le" in each["labels"], query


def test_every_metric_is_shown(selected: list[list[dict[str, Any]]]) -> None:
    names = {each["name"] for found in selected for each in found}
    shown = {metric.describe()[0].name for name, (metric, _) in series().items() if name in names}
    missing = {metric.describe()[0].name for metric, _ in series().values()} - shown
    assert not missing, f"deploy/grafana-dashboard.json has no panel of {', '.join(sorted(missing))}"


def test_legends_name_labels_that_the_query_keeps(selected: list[list[dict[str, Any]]]) -> None:
    targets = [target for panel in BOARD["panels"] for target in panel["targets"]]
    for target, found in zip(targets, selected, strict=False):
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= set(found[0]["labels"]), target


def test_grafanas_own_types_lose_nothing_of_the_file() -> None:
    """What its library does not know, a misspelt key say, it drops."""
    command = [tool("python"), str(ROOT / "tests" / "peers" / "deploy.py"), "grafana"]
    done = subprocess.run(command, input=json.dumps(BOARD), capture_output=True, text=True, check=True, timeout=600)
    assert list(lost(BOARD, json.loads(done.stdout))) == []
    assert list(lost({"panels": [{"titel": "x"}]}, json.loads(done.stdout))) != []


def lost(given: Any, kept: Any, at: str = "") -> Iterator[str]:
    """Yield the places of ``given`` that ``kept`` lacks; it may have more, defaults say."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key), f"{at}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{at}[{index}]")
    elif given != kept:
        yield at


def test_panels_have_titles_places_and_numbers_of_their_own() -> None:
    panels = BOARD["panels"]
    assert len({each["id"] for each in panels}) == len({each["title"] for each in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (each["gridPos"] for each in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24
