"""A reward model of a base that sees, as one that reads alone: what it scores are questions and queries, which are text.

transformers has no form for sequence classification of the Qwen-VL series, but of the language models that are in them. Over text
alone both compute the same: all three of a token's positions (M-RoPE) are its place, and nothing is added by what sees.
"""

from typing import Any

from tasks.errors import TrainingError

_READS_AS = {"qwen3_vl_text": "qwen3", "qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2"}


def as_classifier(scorer: Any) -> Any:
    """The model for sequence classification with one label, its score, that computes what a merged scorer of the series does.

    Args:
        scorer: the model that sees, with a scalar head in the place of the vocabulary's.

    Raises:
        TrainingError: it is of no series that this is written for.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    text = scorer.model.language_model
    known = text.config.to_dict()
    if (kind := _READS_AS.get(known.pop("model_type"))) is None:
        raise TrainingError(
            f"a reward model of {text.config.model_type} cannot be merged: use it unmerged, or train one on a text model or one "
            "of the Qwen-VL series"
        )
    turns = {name: value for name, value in known["rope_parameters"].items() if not name.startswith("mrope")}
    if turns["rope_type"] == "mrope":
        turns["rope_type"] = "default"
    labels = {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}}
    config = AutoConfig.for_model(kind, **known | {"rope_parameters": turns} | labels)
    made = AutoModelForSequenceClassification.from_config(config)
    made.model.load_state_dict(text.state_dict())
    made.score.load_state_dict(scorer.get_output_embeddings().state_dict())
    return made.eval()
