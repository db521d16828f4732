"""Load a saved checkpoint with the head that it was saved with, and nothing that runs foreign code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"


def load_model(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model of a checkpoint folder or Hub repository, in evaluation mode.

    Args:
        path: folder or repository id. A LoRA adapter is loaded on the base model that it names.
        kwargs: for `from_pretrained`, such as `revision`, `token`, `dtype`.

    Raises:
        ValueError: the checkpoint's head is neither a causal language model nor a sequence classifier.
    """
    if (Path(path) / ADAPTER_CONFIG).is_file():
        from peft import AutoPeftModel

        return AutoPeftModel.from_pretrained(path, **kwargs).eval()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    shared = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")
    config = AutoConfig.from_pretrained(path, **{key: kwargs[key] for key in shared if key in kwargs})
    architecture = (config.architectures or ["an unnamed architecture"])[0]
    if architecture.endswith("ForSequenceClassification"):
        auto = AutoModelForSequenceClassification
    elif architecture.endswith(("ForCausalLM", "LMHeadModel")):
        auto = AutoModelForCausalLM
    else:
        raise ValueError(
            f"{architecture} has neither a language-model head nor a sequence-classification head; "
            "load it with its own class."
        )
    return auto.from_pretrained(path, **kwargs).eval()
