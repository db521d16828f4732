"""Distil a mixture, or a committee, into the native readout of one model, so that any runtime gives most of it.

The last MoE layer (router, experts, final norm, head) is trained until the model's own prediction, from the blend of
its experts' hidden states, matches what the mixture of their probabilities predicted. Labels play no part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..hub.checkpoint_files import write_training_record
from ..metrics import calibration_report
from ..model.freezing import set_trainable
from ..model.loading import load_classifier
from ..model.prefix_cache import PrefixCache
from ..predictions import predict
from ..predictions.classifier import padded, tokenized
from ..readouts.committee import count_members, drop_members, save_members
from ..readouts.mixture import Readout
from ..readouts.recorded import load_committee, record_readout, recorded_readout
from ..table import IGNORED_LABEL, columns


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_FIGURES = ("n", "accuracy", "ece", "nll", "brier", "signed_gap")


@dataclass(frozen=True)
class Distilled:
    """What [`distill`] did.

    Attributes:
        divergence (`tuple[float, float]`): mean KL(mixture || native) in nats on the data, before and after.
        figures (`dict[str, dict]`): of the labelled rows of `test`: `"native before"`, `"teacher"`, `"distilled"`;
            empty without `test`.
    """

    divergence: tuple[float, float]
    figures: dict[str, dict[str, Any]]

    def lines(self) -> list[str]:
        """For a terminal."""
        before, after = self.divergence
        lines = [f"KL(mixture || native) on the data: {before:.4f} nats before, {after:.4f} after"]
        if self.figures:
            lines.append(f"{'':<14}{'NLL':>8}{'ECE':>8}{'Brier':>8}{'accuracy':>10}{'gap':>8}{'n':>8}")
        for name, found in self.figures.items():
            numbers = "".join(f"{found[key]:>8.4f}" for key in ("nll", "ece", "brier"))
            lines.append(f"{name:<14}{numbers}{found['accuracy']:>10.3f}{found['signed_gap']:>+8.3f}{found['n']:>8,}")
        return lines


def distill(
    model: nn.Module,
    dataset: Dataset,
    *,
    test: Dataset | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    text_column: str = "text",
    max_length: int | None = None,
    readout: str = "soft_mixture",
    readout_experts: int | str | None = None,
    epochs: int = 3,
    learning_rate: float = 1e-4,
    batch_size: int = 32,
    seed: int = 0,
    prefix_cache: str | None = None,
    prefix_cache_dtype: str | None = None,
    progress: bool = True,
) -> Distilled:
    """Trains a classifier's last MoE layer, in place, to predict natively what its mixture predicted before.

    The loss is the mean KL(mixture || native) over a batch, minimised by AdamW with a learning rate that falls to zero
    along a cosine. A committee teaches as a whole, and its first member alone learns; the others are gone afterwards.

    Args:
        model (`PreTrainedModel`): a mixture-of-experts sequence classifier, with its committee if it has one.
        dataset (`datasets.Dataset`): what to match it on, with a text column or `input_ids`; labels are not read.
        test (`datasets.Dataset`, *optional*): labelled rows on which to say how much of the mixture survives.
        processing_class (`PreTrainedTokenizerBase`, *optional*): tokenizer; needed for text.
        text_column (`str`, *optional*, defaults to `"text"`): the column to tokenize.
        max_length (`int`, *optional*): tokens after which a text is cut.
        readout, readout_experts: the teacher; see [`~hf_moecal.readouts.mixture.Readout`].
        epochs (`int`, *optional*, defaults to 3): passes over the data.
        learning_rate (`float`, *optional*, defaults to 1e-4): at the start.
        batch_size (`int`, *optional*, defaults to 32): sequences per step.
        seed (`int`, *optional*, defaults to 0): of the order of the data.
        prefix_cache, prefix_cache_dtype: as in [`MoECalArguments`].
        progress (`bool`, *optional*, defaults to `True`): whether to show progress bars.

    Returns:
        [`Distilled`]: the divergence from the teacher, and what is left of it on the test rows.

    Raises:
        ValueError: the model is no sequence classifier, the teacher would be the model itself, or there is nothing to
            learn from.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from transformers import MixtralConfig, MixtralForSequenceClassification
    >>> from hf_moecal import distill
    >>> config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, initializer_range=0.5, pad_token_id=0)
    >>> data = Dataset.from_dict({"input_ids": [[i, i + 1, i + 2] for i in range(3, 27)]})
    >>> found = distill(MixtralForSequenceClassification(config), data, epochs=10, learning_rate=1e-2, progress=False)
    >>> found.divergence[1] < found.divergence[0]
    True

    ```
    """
    _check(model, readout, epochs, learning_rate, batch_size)
    set_trainable(model, "last_moe_layer")
    given = {"processing_class": processing_class, "text_column": text_column, "max_length": max_length}
    given |= {"batch_size": batch_size, "progress": progress}
    kind = {"readout": readout, "readout_experts": readout_experts}
    with ExitStack() as stack:
        prefix = None
        if prefix_cache is not None:
            prefix = stack.enter_context(PrefixCache(model, prefix_cache, dtype=prefix_cache_dtype))
        given["prefix"] = prefix
        teacher = _log_probs(predict(model, dataset, **given, **kind))
        figures = {} if test is None else {"teacher": _figures(predict(model, test, **given, **kind))}
        drop_members(model)
        before = _divergence(teacher, predict(model, dataset, layer=None, **given))
        if test is not None:
            figures = {"native before": _figures(predict(model, test, layer=None, **given)), **figures}
        tokens = tokenized(dataset.with_format(None), processing_class, text_column, max_length)
        steps = list(_batches(len(tokens), batch_size, epochs, seed))
        _train(model, prefix, tokens, teacher, steps, learning_rate=learning_rate, progress=progress)
        after = _divergence(teacher, predict(model, dataset, layer=None, **given))
        if test is not None:
            figures["distilled"] = _figures(predict(model, test, layer=None, **given))
    return Distilled((before, after), figures)


def distill_checkpoint(
    model_dir: str | Path,
    dataset: Dataset,
    *,
    output_dir: str | Path,
    readout: str | None = None,
    **settings: Any,
) -> Distilled:
    """Loads a checkpoint with its committee, distils what its `calibration.json` says that predicts, and saves it.

    Args:
        model_dir (`str` or `Path`): folder of the checkpoint and its tokenizer.
        dataset (`datasets.Dataset`): what to match it on.
        output_dir (`str` or `Path`): folder to write, another one.
        readout (`str`, *optional*): the teacher, where the checkpoint names none.
        settings: of [`distill`].

    Raises:
        ValueError: as in [`distill`]; both folders are the same; or the checkpoint names another readout.
    """
    own = recorded_readout(model_dir)
    if Path(model_dir).resolve() == Path(output_dir).resolve():
        raise ValueError("The distilled model would overwrite its teacher; give another output folder.")
    if own.is_mixture and readout not in (None, own.kind):
        raise ValueError(f"The checkpoint is read by {own.name!r}, not by {readout!r}; leave `readout` unset.")
    kind, experts = (own.kind, own.experts) if own.is_mixture else (readout or own.kind, None)
    model, tokenizer = load_classifier(str(model_dir))
    load_committee(model, model_dir, own, {})
    model.to(PartialState().device)
    found = distill(model, dataset, processing_class=tokenizer, readout=kind, readout_experts=experts, **settings)
    model.save_pretrained(output_dir)
    save_members(model, output_dir)  # none: what another committee may have left goes, as does its calibration
    record_readout(output_dir, Readout())
    tokenizer.save_pretrained(output_dir)
    teacher = Readout(kind, experts, members=own.members).name
    ids = [key for key in (dataset["id"] if "id" in dataset.column_names else []) if isinstance(key, str)]
    plain = {name: settings[name] for name in ("epochs", "learning_rate", "batch_size", "seed") if name in settings}
    write_training_record(
        output_dir, settings={"distilled_from": str(model_dir), "teacher": teacher, **plain}, ids=ids
    )
    return found


def _train(
    model: nn.Module,
    prefix: PrefixCache | None,
    tokens: Sequence[list[int]],
    teacher: Tensor,
    steps: Sequence[list[int]],
    *,
    learning_rate: float,
    progress: bool,
) -> None:
    device = next(model.parameters()).device
    pad = model.config.get_text_config().pad_token_id
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    training = model.training
    model.train()
    for rows in tqdm(steps, desc="distill", unit="step", disable=not progress, delay=1):
        batch = padded([tokens[row] for row in rows], pad, device)
        with ExitStack() as stack:
            batch = batch if prefix is None else stack.enter_context(prefix.replaying(batch))
            logits = model(**batch)["logits"]
            kl_divergence(teacher[rows].to(device), logits).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.train(training)


def kl_divergence(log_probs: Tensor, logits: Tensor) -> Tensor:
    """KL(p || softmax(logits)) in nats, `[n]`.

    Args:
        log_probs (`Tensor` of shape `[n, C]`): log p.
        logits (`Tensor` of shape `[n, C]`): with gradient.
    """
    own = logits.to(log_probs.dtype).log_softmax(-1)
    return F.kl_div(own, log_probs, reduction="none", log_target=True).sum(-1)


def _batches(count: int, size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(count, generator=generator).split(size):
            yield rows.tolist()


def _log_probs(table: Dataset) -> Tensor:
    return torch.from_numpy(columns(table, "logits")["logits"]).log_softmax(-1)


def _divergence(teacher: Tensor, table: Dataset) -> float:
    return kl_divergence(teacher.double(), torch.from_numpy(columns(table, "logits")["logits"])).mean().item()


def _figures(table: Dataset) -> dict[str, Any]:
    found = columns(table, "label", "probs")
    if (found["label"] == IGNORED_LABEL).all():
        raise ValueError("No row of `test` has a label; give labelled rows, or none at all.")
    report = calibration_report(found["label"], probs=found["probs"])
    return {name: report[name] for name in _FIGURES}


def _check(model: nn.Module, readout: str, epochs: int, learning_rate: float, batch_size: int) -> None:
    if model.get_output_embeddings() is not None:
        raise ValueError(
            f"Only sequence classifiers are distilled, and {type(model).__name__} is a language model: the teacher's "
            "distributions over a vocabulary would not fit in memory."
        )
    if readout == "native" and count_members(model) == 1:
        raise ValueError("One model's native readout has nothing to learn from itself; set readout='soft_mixture'.")
    for name, value in (("epochs", epochs), ("learning_rate", learning_rate), ("batch_size", batch_size)):
        if not value > 0:
            raise ValueError(f"`{name}` must be above 0, got {value}.")
