"""The pages in infra/: their commands are understood, their figures follow, their paths exist; the bucket policy is minimal."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest

from tasks import cost, simulate
from tasks.collect_events import Flow
from tests.servers import ROOT

PAGES = sorted((ROOT / "infra").rglob("*.md"))
COMMANDS = [
    (page, shlex.split(found))
    for page in PAGES
    for found in re.findall(r"^[A-Z ]*(python -m tasks\..*)$", page.read_text().replace("\\\n", " "), re.MULTILINE)
]
ACTIONS = {
    "put_object": {"s3:PutObject"},
    "upload_fileobj": {"s3:PutObject", "s3:AbortMultipartUpload"},  # its parts are put; what fails is taken back
    "get_object": {"s3:GetObject"},
    "download_fileobj": {"s3:GetObject"},
    "generate_presigned_url": {"s3:GetObject"},  # it signs a get_object, whoever sends it
    "delete_object": {"s3:DeleteObject"},
    "list_objects_v2": {"s3:ListBucket"},
}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=lambda value: " ".join(value[:8]) if isinstance(value, list) else ""
)
def test_commands_are_understood(page: Path, words: list[str]) -> None:
    del page
    model = {"tasks.cost": cost.Night, "tasks.simulate": Flow}[words[2]]
    settings = simulate.validated(model, vars(simulate.flags(model, "").parse_args(words[3:])))
    given = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
    assert given <= set(settings.model_dump())


def test_there_are_commands_to_check() -> None:
    assert {words[2] for _, words in COMMANDS} == {"tasks.cost", "tasks.simulate"}


def test_the_example_costs_what_the_page_says() -> None:
    text = (ROOT / "infra/aws/README.md").read_text()
    ((_, words),) = [(page, words) for page, words in COMMANDS if words[2] == "tasks.cost"]
    found = cost.bill(cost.night_of(vars(simulate.flags(cost.Night, "").parse_args(words[3:])), None, "."))
    rows = dict(re.findall(r"^\| (collection|training|all) \|.*\| ([\d.]+) \|$", text, re.MULTILINE))
    costs = {"collection": found.serving_cost, "training": found.training_cost, "all": found.total}
    assert rows == {name: f"{value:.2f}" for name, value in costs.items()}
    assert f"{found.puts:,} PUT and LIST, {found.gets:,} GET" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\b(?:infra|flows|tasks|deployments|tests)/[\w./-]*\w", text):
        assert (ROOT / name).exists() or name == "infra/.env", name


def test_the_policy_allows_what_storage_does_and_no_more() -> None:
    tree = ast.parse((ROOT / "tasks/storage.py").read_text())
    done = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "client"}
    paged = {
        n.args[0].value
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and ast.unparse(n.func) == "client.get_paginator"
        and isinstance(n.args[0], ast.Constant)
    }
    operations = done - {"get_paginator"} | paged
    policy = json.loads((ROOT / "infra/aws/bucket-policy.json").read_text())
    assert policy["Version"] == "2012-10-17"
    allowed = [s for s in policy["Statement"] if s["Effect"] == "Allow"]
    actions = [a for s in allowed for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])]
    assert set(actions) == set[str]().union(*(ACTIONS[operation] for operation in operations))
    assert not any("*" in action for action in actions)
    for statement in allowed:
        assert re.fullmatch(r"arn:aws:iam::\d{12}:role/drag-run", statement["Principal"]["AWS"])
        if statement["Action"] == "s3:ListBucket":  # of the bucket, so held to the prefix by its condition
            assert statement["Resource"] == "arn:aws:s3:::EXAMPLE-BUCKET"
            assert statement["Condition"] == {"StringLike": {"s3:prefix": ["drag", "drag/*"]}}
        else:
            assert statement["Resource"] == "arn:aws:s3:::EXAMPLE-BUCKET/drag/*"
    (denied,) = [s for s in policy["Statement"] if s["Effect"] == "Deny"]
    assert denied["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
