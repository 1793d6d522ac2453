"""Run in .venv-deploy, standard input to JSON: ``deploy.py compose``, ``deploy.py grafana``, ``deploy.py promql``.

The first two read a file as its own library does and print what that understood of it. The last takes a list of
queries and prints for each the series that it selects, with the functions around them, and the labels it groups by.
"""

import json
import sys

import promql_parser


def compose(text):
    from compose_spec import PyCompose

    return PyCompose.from_yaml(text).to_spec().model_dump(mode="json", exclude_none=True)


def grafana(text):
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    return json.loads(JSONEncoder().encode(Dashboard.from_json(json.loads(text))))


def promql(text):
    return [selected(promql_parser.parse(each), [], set()) for each in json.loads(text)]


def selected(expression, around, labels):
    """Return the selections of a query: name, label matchers, functions around it, and labels that are grouped by."""
    kind = type(expression).__name__
    if kind == "VectorSelector":
        matched = [each.name for each in expression.matchers.matchers if each.name != "__name__"]
        return [{"name": expression.name, "around": around, "labels": sorted({*labels, *matched})}]
    if kind == "MatrixSelector":
        return selected(expression.vector_selector, around, labels)
    if kind == "AggregateExpr":
        kept = set(expression.modifier.labels) if expression.modifier else set()
        return selected(expression.expr, [*around, str(expression.op)], labels | kept)
    if kind == "Call":
        return [found for each in expression.args for found in selected(each, [*around, expression.func.name], labels)]
    if kind == "BinaryExpr":
        return selected(expression.lhs, around, labels) + selected(expression.rhs, around, labels)
    if kind in ("ParenExpr", "UnaryExpr", "SubqueryExpr"):
        return selected(expression.expr, around, labels)
    assert kind in ("NumberLiteral", "StringLiteral"), kind
    return []


print(json.dumps({"compose": compose, "grafana": grafana, "promql": promql}[sys.argv[1]](sys.stdin.read())))
