"""What the Prefect UI shows as a flow's run form, and what a flow makes of what was filled in."""

from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from flows import deploy_files
from flows.collect import collect
from flows.finetune import finetune
from flows.form import SettingsFlow
from flows.improve import improve
from tasks import config
from tasks.errors import ConfigError

SPECS = deploy_files.read_deployments("s3://bucket/prefix")


def form(flow: SettingsFlow[Any, Any]) -> dict[str, Any]:
    """The schema that a deployment of the flow is registered with."""
    return parameter_schema(flow).model_dump(exclude_unset=True)


def sections(schema: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """The fields of the form itself and of each section; one that is a section has what the section says of itself."""
    models = schema.get("definitions", {})
    found = []
    for section in (schema, *models.values()):
        fields = section["properties"].items()
        found.append({name: models.get(field.get("$ref", "").split("/")[-1], {}) | field for name, field in fields})
    return found


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_parameter_has_a_label_help_and_its_place(spec: deploy_files.DeploymentSpec) -> None:
    for fields in sections(form(spec.flow())):
        assert [field["position"] for field in fields.values()] == list(range(len(fields)))
        for name, field in fields.items():
            assert field["description"][-1] in ".?", name
            assert field["title"][0].isupper() or field["title"] in ("vLLM", "bfloat16"), name
            assert "_" not in field["title"], name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_value_that_may_be_left_out_is_one_input_not_a_choice_of_types(spec: deploy_files.DeploymentSpec) -> None:
    for fields in sections(form(spec.flow())):
        for name, field in fields.items():
            alternatives = [choice for choice in field.get("anyOf", []) if "$ref" not in choice]
            assert alternatives in ([], [{"type": "null"}]), name


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_no_help_has_words_that_markdown_would_take_for_tags(spec: deploy_files.DeploymentSpec) -> None:
    for fields in sections(form(spec.flow())):
        for name, field in fields.items():
            outside_code = "".join(field["description"].split("`")[::2])
            assert "<" not in outside_code, name


def test_what_people_change_first_comes_first() -> None:
    assert list(form(improve)["properties"])[:5] == ["storage", "ingest", "collect", "mine", "server"]
    assert list(form(collect)["properties"])[-1] == "serve"


@pytest.mark.parametrize(
    "filled_in",
    [
        {"collect": {"limit": 3, "samples": 2}, "server": {"base_url": ["http://127.0.0.1:8000/v1"]}},
        {"storage": "here"},
    ],
)
def test_what_is_filled_in_reaches_the_flow_and_the_rest_is_the_models(filled_in: dict[str, Any]) -> None:
    validate(filled_in, form(collect), raise_on_error=True)
    parameters = collect.validate_parameters(filled_in)
    assert config.CollectRun(**parameters) == config.CollectRun.model_validate(filled_in)


@pytest.mark.parametrize(
    ("filled_in", "says"),
    [
        ({"collect": {"limit": 0}}, "collect.limit: "),
        ({"collect": {"limits": 5}}, "collect.limits: "),
        ({"server": {"base_url": ["http://user:SECRET@host/v1"]}}, r"server.base_url.0: .*OPENAI_API_KEY"),
        ({"server": {"base_url": ["https://host/v1?key=SECRET"]}}, r"server.base_url.0: .*OPENAI_API_KEY"),
    ],
)
def test_what_cannot_be_is_refused_by_form_and_flow_and_not_quoted(filled_in: dict[str, Any], says: str) -> None:
    assert validate(filled_in, form(collect))
    with pytest.raises(ConfigError, match=says) as raised:
        collect.validate_parameters(filled_in)
    assert "SECRET" not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"finetune": {"lora_r": 64}}, "lora_r is above max_lora_rank"),
        ({"refine": {"method": "dpo"}}, r"no training set that dpo learns from \(dpo\)"),
        ({"refine": {"method": "reward"}}, "a reward model scores queries"),
        ({"agent": {"observation": "image"}, "format": {"formats": ["sft_context"]}}, "set tower_lora"),
        (
            {"agent": {"observation": "image"}, "format": {"formats": ["sft_best"]}, "mine": {"states": "both"}},
            "set tower_lora",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        improve.validate_parameters({"ingest": {"documents": str(tmp_path)}, **settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"name": "mine"}, "leave name empty"), ({"from_adapter": "sft"}, "leave from_adapter empty")],
)
def test_a_reward_model_is_not_kept_or_started_as_an_adapter_is(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        finetune.validate_parameters({"finetune": {"method": "reward"}, **settings})
