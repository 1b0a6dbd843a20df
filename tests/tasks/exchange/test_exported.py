"""What lies beside an export's files: read, or refused with the place that is wrong."""

from pathlib import Path

import pytest

from tasks.errors import InputError
from tasks.exchange import exported


def test_what_is_not_known_is_kept_and_what_is_not_there_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "sft_best_train.jsonl"
    file.write_text("")
    assert exported.read(str(file)) == {}
    (tmp_path / "provenance.json").write_text('{"sft_best": {"rows": 3, "provenance": {"model": "tiny"}}}')
    for source in (str(file), str(tmp_path)):
        (table,) = exported.read(source).values()
        assert table.provenance.model_dump(exclude_unset=True) == {"model": "tiny"}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("{", "EOF"),
        ("[]", "should be an object"),
        ('{"sft_best": 3}', "(sft_best: "),
        ('{"sft_best": {"provenance": {"settings": {"agent": "tools"}}}}', "(sft_best.provenance.settings.agent: "),
        ('{"sft_best": {"provenance": {"prompt_messages": "two"}}}', "(sft_best.provenance.prompt_messages: "),
    ],
)
def test_what_no_export_wrote_is_refused(tmp_path: Path, said: str, told: str) -> None:
    (tmp_path / "provenance.json").write_text(said)
    with pytest.raises(InputError) as refused:
        exported.read(str(tmp_path))
    assert "provenance.json: is not what an export writes (" in str(refused.value)
    assert told in str(refused.value)
