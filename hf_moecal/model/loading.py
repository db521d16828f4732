"""Load a saved checkpoint with the head that it was saved with; nothing is unpickled and no foreign code is run."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .classifier import HEAD, label_arguments, register_classifier


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LANGUAGE_HEADS = ("ForCausalLM", "LMHeadModel", "CAUSAL_LM")
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def load_model(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """The model of a checkpoint folder or Hub repository, in evaluation mode, from safetensors only.

    Args:
        path: folder or repository id. A LoRA adapter is loaded on the base model that it names.
        kwargs: for `from_pretrained`, such as `revision`, `token`, `dtype`.

    Raises:
        ValueError: the checkpoint's head is neither a causal language model nor a sequence classifier.
    """
    from transformers import AutoConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
    if find_adapter_config_file(str(path), **hub) is not None:
        return _load_adapter(path, hub, kwargs)
    config = AutoConfig.from_pretrained(path, **hub)
    architecture = (config.architectures or ["an unnamed architecture"])[0]
    return _auto_class(architecture, config).from_pretrained(path, use_safetensors=True, **kwargs).eval()


def _auto_class(architecture: str, config: PreTrainedConfig) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if architecture.endswith((HEAD, "SEQ_CLS")):
        register_classifier(config)
        return AutoModelForSequenceClassification
    if architecture.endswith(_LANGUAGE_HEADS):
        return AutoModelForCausalLM
    raise ValueError(
        f"{architecture} has neither a language-model head nor a sequence-classification head; load it with its own "
        "class and hf_moecal.hub.attach_calibrator."
    )


def language_vocabulary(path: str | Path) -> int | None:
    """Number of tokens that a saved language model predicts; `None` for a classifier, or where no config says."""
    from transformers import AutoConfig

    adapter = Path(path) / ADAPTER_CONFIG
    if not adapter.exists() and not (Path(path) / "config.json").exists():
        return None
    config = AutoConfig.from_pretrained(_whole(str(path)))
    saved = json.loads(adapter.read_text()) if adapter.exists() else {}
    head = str(saved["task_type"] if saved else (config.architectures or [""])[0])
    return config.get_text_config().vocab_size if head.endswith(_LANGUAGE_HEADS) else None


def _load_adapter(path: str | Path, hub: Mapping[str, Any], kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """The base model with the adapter on it. The adapter's head says how many classes there are; its base does not."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig

    adapter = PeftConfig.from_pretrained(path, **hub)
    task = getattr(adapter.task_type, "value", adapter.task_type)
    of_base = {**kwargs, "revision": adapter.revision or "main"}
    base_hub = {key: of_base[key] for key in HUB_ARGUMENTS if key in of_base}
    config = AutoConfig.from_pretrained(adapter.base_model_name_or_path, **base_hub)
    auto = _auto_class(str(task or "An adapter without a task type"), config)
    if task == "SEQ_CLS":
        of_base |= label_arguments(config, of_base.pop("num_labels", None) or _num_labels(path, hub))
    base = auto.from_pretrained(adapter.base_model_name_or_path, use_safetensors=True, **of_base)
    return PeftModel.from_pretrained(base, path, use_safetensors=True, **hub).eval()


def _num_labels(path: str | Path, hub: Mapping[str, Any]) -> int:
    from huggingface_hub import hf_hub_download
    from safetensors import safe_open

    file = Path(path) / ADAPTER_WEIGHTS
    with safe_open(file if file.is_file() else hf_hub_download(str(path), ADAPTER_WEIGHTS, **hub), "pt") as tensors:
        heads = [name for name in tensors.keys() if name.endswith(("score.weight", "classifier.weight"))]
        if not heads:
            raise ValueError(f"The adapter {str(path)!r} brings no classification head; pass num_labels.")
        return tensors.get_slice(heads[0]).get_shape()[0]


def load_classifier(
    path: str, num_labels: int | None = None, *, seed: int = 0, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence-classification model and its tokenizer.

    With `num_labels` the model is to be trained: a head that the checkpoint lacks is drawn from `seed`. Without,
    it is to predict as it was saved.

    Raises:
        ValueError: without `num_labels`, the checkpoint lacks weights, such as those of a head.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

    set_seed(seed)
    tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(_whole(path))
    register_classifier(config)
    changes = {} if num_labels is None else label_arguments(config, num_labels)
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, output_loading_info=True, **_precision(path, dtype), **changes
    )
    if num_labels is None:
        _require_whole(path, model, info, "a classification head; train one first with `moecal train`, or, for a "
                       "language model, use task='choice' or 'lm' (--task)")  # fmt: skip
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_language_model(
    path: str, *, seed: int = 0, dtype: str = "float32"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer; `seed` is that of what follows.

    Raises:
        ValueError: the checkpoint lacks weights, as a classifier lacks a language model's head.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(seed)
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **_precision(path, dtype))
    _require_whole(path, model, info, "a language model's head; use task='classification' for a classifier")
    return model, AutoTokenizer.from_pretrained(path)


def _require_whole(path: str, model: PreTrainedModel, info: Mapping[str, Any], head: str) -> None:
    """Refuses a model of which a part was drawn at random: its predictions would be noise."""
    missing = sorted(info["missing_keys"])
    if not missing:
        return
    base = f"{model.base_model_prefix}."
    if all(not key.startswith(base) for key in missing):
        raise ValueError(f"{path} has no {', '.join(missing)}: it is a checkpoint without {head}.")
    raise ValueError(
        f"{path} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; is the "
        "checkpoint whole?"
    )


def own_labels(path: str | Path) -> dict[str, int] | None:
    """The number of each class that a saved classifier's config names; `None` if it is no classifier's."""
    from transformers import AutoConfig

    if Path(path).exists() and not (Path(path) / "config.json").exists():  # an adapter
        return None
    config = AutoConfig.from_pretrained(path)
    return label_names(config) if (config.architectures or [""])[0].endswith("ForSequenceClassification") else None


def label_names(config: Any) -> dict[str, int]:
    """The number of each class that a config names."""
    return {str(name): int(number) for number, name in (getattr(config, "id2label", None) or {}).items()}


def _precision(path: str, dtype: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` that give plain weights, also where the checkpoint stores them quantized."""
    from transformers import AutoConfig
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored = getattr(AutoConfig.from_pretrained(_whole(path)), "quantization_config", None)
    if stored is None:
        return {"dtype": dtype}
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING[stored["quant_method"]]
    if "dequantize" not in inspect.signature(kind.__init__).parameters:
        return {"dtype": dtype}
    return {"dtype": dtype, "quantization_config": kind.from_dict({**stored, "dequantize": True})}


def _whole(path: str) -> str:
    """Where the whole model is: the checkpoint of an adapter names it."""
    from transformers.utils import find_adapter_config_file

    adapter = find_adapter_config_file(path)
    return path if adapter is None else json.loads(Path(adapter).read_text())["base_model_name_or_path"]
