"""The command line: `drag STAGE [flags]`. Each command runs a flow; its flags are the fields of the flow's settings.

Exit codes: 0 done; 2 unusable input or settings; 3 an artifact is missing or stale, or storage does not answer; 4 a server; 5 the
model yields no search; 6 training; 7 too many rollouts failed; 8 nothing to learn from; 130 interrupted. No traceback for what a
user can mend.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape

from flows.flags import add_flags, settings_from
from tasks import config
from tasks.errors import DragError


class Command(NamedTuple):
    """A command: the flow that it runs (module:name), the settings that the flow takes, and what it is for."""

    runs: str
    settings: type[BaseModel]
    help: str


COMMANDS = {
    "ingest": Command("flows.ingest:ingest", config.IngestRun, "PDFs, OCR text, questions → pages and index"),
    "collect": Command("flows.collect:collect", config.CollectRun, "questions → search trajectories of the model"),
    "reparse": Command("flows.reparse:reparse", config.ReparseRun, "trajectories → the same, read by today's parser"),
    "mine": Command("flows.mine:mine", config.MineRun, "questions, or conversations → queries that the index scores"),
    "process": Command("flows.prepare:process", config.ProcessRun, "trajectories → scored rollouts, preference pairs"),
    "format": Command("flows.prepare:format_", config.FormatRun, "scored rollouts → training sets"),
    "finetune": Command("flows.finetune:finetune", config.FinetuneRun, "training set → adapter, or reward model"),
    "merge": Command("flows.finetune:merge", config.MergeRun, "adapter and base → one model"),
    "serve": Command("flows.serve:serve", config.ServeRun, "hold a model server until interrupted"),
    "evaluate": Command("flows.evaluate:evaluate", config.EvaluateRun, "measure runs on unseen questions"),
    "compare": Command("flows.evaluate:compare", config.CompareRun, "compare runs that were measured; report"),
    "infer": Command("flows.infer:infer", config.InferRun, "ask one question, or many in turn"),
    "import": Command("flows.import_:import_", config.ImportRun, "files of others → what the next stages take"),
    "export": Command("flows.export:export", config.ExportRun, "what was made → files for others"),
    "improve": Command("flows.improve:improve", config.Improve, "the whole loop, once round"),
    "deploy": Command("flows.deploy:deploy", config.Deploy, "what deployments/ says → the Prefect server"),
    "demo": Command("flows.demo:demo", config.Improve, "the whole loop on documents that the project generates"),
}
# settings that are a word after the command rather than a flag
WORDS: dict[str, list[tuple[str, ...]]] = {
    "finetune": [("finetune", "method")],
    "import": [("what",), ("source",)],
    "export": [("what",), ("target",)],
}
_NO_FLOWS = {"infer", "deploy"}
RECIPES = {"demo": Path(__file__).resolve().parents[1] / "deployments" / "recipes" / "demo.yaml"}


class _CommandParser(argparse.ArgumentParser):
    """A command's own parser: what it cannot read it tells under its own name, with the flag that was perhaps meant."""

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        """As argparse, but nothing unknown is left for the parser of all commands, which knows no flags."""
        found, unknown = super().parse_known_args(*arguments, **named)
        if unknown:
            flags = set(re.findall(r"--[\w-]+", self.format_help()))
            near = [flag for word in unknown for flag in difflib.get_close_matches(word.partition("=")[0], flags, 1)]
            meant = f"did you mean {' '.join(near)}?" if near else f"see {self.prog} --help"
            self.error(f"unrecognized arguments: {' '.join(unknown)}; {meant}")
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="drag", description="A language model learns to search your PDFs better.")
    parser.add_argument("--version", action="version", version=f"drag {importlib.metadata.version('drag')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, command in COMMANDS.items():
        words = WORDS.get(name, [])
        sub = commands.add_parser(
            name,
            usage=" ".join([f"drag {name}", *(path[-1].upper() for path in words), "[flags]"]),
            help=command.help,
            description=command.help,
            argument_default=argparse.SUPPRESS,
        )
        add_flags(sub, command.settings, words=words)
        if "server" in command.settings.model_fields:
            sub.add_argument("--api-key", help="The server's key. Better: OPENAI_API_KEY, which no process list shows.")
        sub.set_defaults(config=RECIPES.get(name))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    command = COMMANDS[arguments.command]
    errors = Console(stderr=True)
    try:
        settings = settings_from(command.settings, arguments)
        _quieten()
        if key := getattr(arguments, "api_key", None):
            os.environ["OPENAI_API_KEY"] = key  # no setting: settings are shown in forms and stored with artifacts
        _run(command, settings)
    except DragError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        anew = any(vars(arguments).get(f"{section}.resume") is False for section in ("collect", "mine"))
        without = " without --no-resume" if anew else ""
        errors.print(f"Interrupted. The same command{without} goes on from here.")
        return 130
    return 0


def _quieten() -> None:
    """Nothing is reported home, and the terminal shows DRAG's own progress; the logs are in the Prefect UI."""
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _run(command: Command, settings: BaseModel) -> None:
    """Run a flow against the configured Prefect server or an embedded one; what is no flow needs none."""
    module, _, name = command.runs.partition(":")
    target = getattr(importlib.import_module(module), name)
    if name in _NO_FLOWS:
        target(settings)
        return
    from flows.embedded import prefect_server

    with prefect_server():
        target(settings)


if __name__ == "__main__":
    sys.exit(main())
