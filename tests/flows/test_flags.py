"""Command-line flags: made from the settings, checked by them, named as the reference pipeline's."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import BaseModel

from flows.cli import COMMANDS, _parser, main
from flows.flags import add_flags, flag_names, settings_from, validated
from tasks import config
from tasks.errors import ConfigError, InputError

# flags that the reference pipeline has for the same thing, by the command that takes its place
REFERENCE_FLAGS = {
    "ingest": ["--ocr-file", "--include-json", "--exclude-json", "--train-ratio"],
    "collect": [
        *("--model", "--base-url", "--sampling-config", "--concurrency", "--limit", "--resume"),
        *("--max-iterations", "--top-k", "--api-key"),
    ],
    "format": ["--formats", "--train-ratio"],
    "finetune": [
        *("--model", "--epochs", "--batch-size", "--lr", "--lora-r", "--mask-strategy", "--weight-scheme"),
        "--max-length",
    ],
    "process": ["--min-rank-score", "--include-failed"],
    "compare": ["--compare"],
}


def parse(model: type[BaseModel], *flags: str) -> BaseModel:
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    add_flags(parser, model)
    parser.set_defaults(config=None)
    return settings_from(model, parser.parse_args(flags))


@pytest.mark.parametrize("command", REFERENCE_FLAGS)
def test_the_reference_pipelines_flags_are_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args([command, *(["sft"] if command == "finetune" else []), "--help"])
    shown = capsys.readouterr().out
    assert [flag for flag in REFERENCE_FLAGS[command] if f"{flag} " not in shown and f"{flag}," not in shown] == []


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_field_has_one_flag_and_a_description(command) -> None:
    names = flag_names(command.settings)
    assert len(set(names.values())) == len(names)
    models = [command.settings]
    while models:
        for name, info in models.pop().model_fields.items():
            assert info.description, f"{name} has no description"
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                models.append(info.annotation)


def test_flags_reach_nested_settings() -> None:
    settings = parse(
        config.CollectRun,
        "--max-iterations",
        "3",
        "--sampling-config",
        "greedy",
        "diverse",
        "--no-resume",
        "--examples",
    )
    assert settings.agent.max_iterations == 3
    assert settings.agent.examples is True
    assert settings.collect.sampling_config == ["greedy", "diverse"]
    assert settings.collect.resume is False


def test_a_flag_overrides_the_recipe_and_leaves_the_rest(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"storage": "here", "finetune": {"epochs": 3, "lr": 0.01}}))
    settings = parse(config.FinetuneRun, "--config", str(recipe), "--lr", "0.02")
    assert (settings.storage, settings.finetune.epochs, settings.finetune.lr) == ("here", 3, 0.02)


@pytest.mark.parametrize("command", ["collect", "mine", "infer", "serve", "merge", "export"])
def test_an_adapter_is_the_newest_or_one_by_its_name(command: str, tmp_path: Path) -> None:
    words = [command, *(["adapter", "folder"] if command == "export" else [])]

    def told(*flags: str) -> str:
        return settings_from(COMMANDS[command].settings, _parser().parse_args([*words, *flags])).adapter

    alone = [] if command in ("merge", "export") else ["--adapter"]  # these two take one in any case
    assert [told(), told(*alone), told("--adapter", "context")] == [told(), "newest", "context"]
    assert told() == ("" if alone else "newest")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"adapter": "context"}))
    assert told("--config", str(recipe)) == "context"
    with pytest.raises(ConfigError, match="--adapter"):
        told("--adapter", "../context")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["finetune", "sft", "--name", "newest"], "choose another name"),
        (["import", "adapter", "folder", "--name", "newest"], "choose another name"),
        (["import", "dpo", "file.jsonl", "--name", "mine"], "leave name empty"),
        (["merge", "--source", "reward_model", "--adapter", "mine"], "leave adapter out"),
        (["export", "reward-model", "folder", "--adapter", "mine"], "leave adapter out"),
        (["import", "trajectories", "a.jsonl", "b.jsonl"], r"leave b\.jsonl out, or join the files"),
        (["import", "mined", "a.jsonl", "b.jsonl"], r"leave b\.jsonl out, or join the files"),
        (["import", "adapter", "a", "b"], "leave b out"),
    ],
)
def test_what_would_be_passed_over_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings_from(COMMANDS[words[0]].settings, _parser().parse_args(words))


def test_one_server_or_several(tmp_path: Path) -> None:
    a, b = "http://a:8000/v1", "http://b:8000/v1"
    recipe = tmp_path / "recipe.yaml"
    for written, read in ((a, [a]), ([a, b], [a, b]), (None, [])):
        recipe.write_text(yaml.safe_dump({"server": {"base_url": written}}))
        assert parse(config.CollectRun, "--config", str(recipe)).server.base_url == read
    assert parse(config.CollectRun, "--base-url", a, b).server.base_url == [a, b]
    form = config.Server.model_json_schema()["properties"]["base_url"]
    assert (form["type"], form["items"]["type"]) == ("array", "string")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--base-url", "host:8000/v1"], "--base-url"),
        (["--base-url", "http://me:secret@host/v1"], "--base-url"),
        (["--samples", "none"], "--samples"),
        (["--sampling-config", "hot"], "--sampling-config"),
        (["--top-p", "1.5"], "--top-p"),
    ],
)
def test_a_bad_value_is_named_by_its_flag(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(config.CollectRun, *flags)


@pytest.mark.parametrize("flags", [[], ["--documents", ""], ["--questions", "questions.jsonl"]])
@pytest.mark.parametrize("model", [config.IngestRun, config.Improve])
def test_what_is_read_must_be_named(model: type[BaseModel], flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"ingest: .*--documents.*--ocr-file.*or both"):
        parse(model, *flags)
    assert parse(model, "--ocr-file", "x.jsonl").ingest.documents is None


def test_ocr_text_is_no_folder_of_documents() -> None:
    with pytest.raises(ConfigError, match=r"--documents: .*--ocr-file"):
        parse(config.IngestRun, "--documents", "ocr_output.jsonl")


def test_a_recipe_that_is_none_says_so(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(InputError, match=r"list\.yaml"):
        parse(config.CollectRun, "--config", str(tmp_path / "list.yaml"))
    (tmp_path / "extra.yaml").write_text("nonsense: 1\n")
    with pytest.raises(ConfigError, match="nonsense"):
        parse(config.CollectRun, "--config", str(tmp_path / "extra.yaml"))


def test_a_users_mistake_ends_with_its_code_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--samples", "0"]) == 2
    shown = capsys.readouterr().err
    assert "--samples" in shown
    assert "Traceback" not in shown


def test_a_prefect_server_that_does_not_answer_is_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert main(["process", "--storage", "nowhere"]) == 4
    shown = capsys.readouterr().err
    assert "no Prefect server answers at http://127.0.0.1:9/api" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("recipe", sorted(Path("deployments/recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_committed_recipe_loads_by_the_command_that_it_names(recipe: Path) -> None:
    commands = re.findall(rf"^#   drag (.* --config {recipe}.*)$", recipe.read_text(), re.MULTILINE)
    assert commands, f"its head names no command: #   drag COMMAND --config {recipe}"
    for command in commands:
        arguments = _parser().parse_args(shlex.split(command))
        assert settings_from(COMMANDS[arguments.command].settings, arguments)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": {"formats": ["dpo"]}}, "sft"),
        ({"finetune": {"method": "dpo"}}, "no training set that dpo learns from"),
        ({"finetune": {"method": "reward"}, "format": {"formats": ["reward"]}}, "scores queries and makes none"),
        ({"finetune": {"lora_r": 64}}, "max_lora_rank"),
        ({"variants": [{"name": "a", "model": "base"}, {"name": "a", "model": "question"}]}, "different names"),
        (
            {"variants": [{"name": "a", "model": "base"}, {"name": "b", "model": "adapter", "examples": True}]},
            "prompt it is trained on",
        ),
        ({"collect_agent": {"protocol": "tools"}}, "tool_call_parser"),
        ({"collect_agent": {"observation": "image"}, "serve": {"images_per_prompt": 0}}, "images_per_prompt is 0"),
        ({"collect_agent": {"guided": True}, "server": {"extensions": False}}, "set extensions"),
        (
            {
                "finetune": {"lora_r": 8},
                "refine": {"method": "dpo", "lora_r": 16},
                "format": {"formats": ["sft_best", "dpo"]},
            },
            "leave its lora_r out",
        ),
    ],
)
def test_settings_that_would_fail_after_hours_are_refused_at_once(changes: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validated(config.Improve, {"ingest": {"documents": "pdfs"}} | changes)


def test_a_second_training_has_the_lora_shape_of_the_first() -> None:
    recipe = "deployments/recipes/small-model.yaml"
    settings = parse(config.Improve, "--config", recipe, "--documents", "pdfs", "--lora-r", "8")
    assert [(training.method, training.lora_r) for training in settings.trainings] == [("sft", 8), ("dpo", 8)]


def test_a_training_s_method_says_what_it_learns_from() -> None:
    def told(*words: str) -> config.FinetuneRun:
        return settings_from(config.FinetuneRun, _parser().parse_args(["finetune", *words]))

    assert [told(method).learned_from for method in ("sft", "dpo", "reward")] == ["sft_best", "dpo", "reward"]
    assert told("sft", "--training-set", "sft_context").learned_from == "sft_context"
    assert told("dpo", "--from-adapter", "sft", "--margin-scale", "0.5").finetune.margin_scale == 0.5
    for words, says in (
        (("reward", "--from-adapter", "sft"), "starts from the base model"),
        (("reward", "--weight-scheme", "binary"), "weight_scheme none"),
    ):
        with pytest.raises(ConfigError, match=says):
            told(*words)
    with pytest.raises(SystemExit):
        told("--epochs", "1")
    loop = {"ingest": {"documents": "pdfs"}, "format": {"formats": ["reward", "dpo", "sft_context", "sft_best"]}}
    for method, learned in (("sft", "sft_context"), ("dpo", "dpo")):
        settings = validated(config.Improve, loop | {"finetune": {"method": method}})
        assert settings.learned_from(settings.finetune) == learned


def test_an_empty_section_of_a_recipe_takes_flags(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("finetune:\n")
    settings = parse(config.FinetuneRun, "--config", str(tmp_path / "empty.yaml"), "--lr", "0.5")
    assert settings.finetune.lr == 0.5


def test_a_value_where_a_recipe_has_a_section_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("finetune: sft\n")
    with pytest.raises(InputError, match=r"recipe.yaml: finetune is 'sft', and no section"):
        parse(config.FinetuneRun, "--config", str(recipe), "--lr", "0.5")


def test_tools_need_somebody_who_reads_the_calls() -> None:
    for model, extra in ((config.CollectRun, []), (config.Improve, ["--documents", "folder"])):
        with pytest.raises(ConfigError, match="tool_call_parser"):
            parse(model, "--protocol", "tools", *extra)
        for more in (["--tool-call-parser", "hermes"], ["--base-url", "http://host/v1"]):
            assert parse(model, "--protocol", "tools", *more, *extra).agent.protocol == "tools"


def test_guided_decoding_is_asked_for_in_fields_of_vllm() -> None:
    assert parse(config.CollectRun, "--guided").agent.guided
    with pytest.raises(ConfigError, match="set extensions"):
        parse(config.CollectRun, "--guided", "--no-extensions")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ingest --questoins q.jsonl", "unrecognized arguments: --questoins q.jsonl; did you mean --questions?"),
        ("improve --documents d --limit 3", "did you mean --collect-limit?"),
        ("finetune sft --zzz 1", "see drag finetune --help"),
    ],
)
def test_an_unknown_flag_is_told_by_its_command_with_what_was_perhaps_meant(
    words: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words.split())
    said = capsys.readouterr().err
    assert said.startswith(f"usage: drag {words.split()[0]} ")
    assert len(said.splitlines()) == 2
    assert says in said
