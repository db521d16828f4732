"""Supervised fine-tuning: TRL's datasets, chat templates and adapters, with the objective over the optimizer batch.

Needs trl (`pip install 'hf_moecal[trl]'`), which is why nothing else imports this module.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.training_args import ParallelMode

from .arguments import MoECalArguments
from .compatibility import check_arguments
from .prepared import named_arguments
from .trainer import MoECalMixin


try:
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import create_model_from_path
except ImportError as error:
    raise ImportError("Supervised fine-tuning needs trl; install it with `pip install 'hf_moecal[trl]'`.") from error


@dataclass
class MoECalSFTConfig(SFTConfig, MoECalArguments):
    """Arguments of [`MoECalSFTTrainer`]: every field of `trl.SFTConfig` and of [`MoECalArguments`].

    Where both have a default, TRL's holds (`learning_rate=2e-5`, `bf16`, `gradient_checkpointing`, ...).

    Args:
        task (`str`, *optional*, defaults to `"lm"`): stays `"lm"`; whether an answer or a token is one example of the
            objective is said by `example`.
        kwargs: fields of the two classes.

    Raises:
        ValueError: a field is out of range, or asks for what cannot be combined with the objective:
            `activation_offloading`, or another `loss_type` than `"nll"`.

    Example:

    ```python
    >>> from hf_moecal.training.sft import MoECalSFTConfig
    >>> config = MoECalSFTConfig("out", objective="robust", completion_only_loss=True, report_to="none", use_cpu=True)
    >>> config.task, config.example, config.learning_rate
    ('lm', 'sequence', 2e-05)

    ```
    """

    task: str = field(default="lm", metadata={"help": "Stays 'lm'."})

    def __post_init__(self):
        if self.task != "lm":
            raise ValueError(
                f"Supervised fine-tuning trains a language model, so `task` stays 'lm', got {self.task!r}."
            )
        if self.loss_type != "nll":
            raise ValueError(
                f"`loss_type={self.loss_type!r}` would replace the losses that the objective weighs; set "
                "loss_type='nll'. The logits exist in chunks anyway."
            )
        if self.activation_offloading:
            raise ValueError(
                "`activation_offloading=True` is not supported; set it to False. `gradient_checkpointing=True`, the "
                "default, saves the same memory."
            )
        if getattr(self, "activation_checkpointing", False) is None:  # what transformers calls it now
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        super().__post_init__()


class MoECalSFTTrainer(MoECalMixin, SFTTrainer):
    """`trl.SFTTrainer` with objectives that keep the confidence of answers honest under shift.

    Everything that SFTTrainer does with data holds: text, prompt-completion and conversational datasets,
    `completion_only_loss`, `assistant_only_loss`, chat templates, `peft_config`, `packing` and `padding_free`. The
    objective is that of [`MoECalTrainer`] with `task="lm"`, over the whole optimizer batch: an example is an answer,
    with the mean loss of its supervised tokens (`example="sequence"`), or a token (`example="token"`). Answers that
    are packed into one row stay examples of their own (with `packing_strategy="wrapped"`, which cuts texts anywhere, a
    row is one example).

    SFTTrainer's `entropy`, `mean_token_accuracy` and `num_tokens` are logged too, of the forward that trains: each
    token counts once, however often the objective looks at it. `evaluate` gives `eval_<set>_ece` and so on of tokens
    and `eval_<set>_sequence_ece` and so on of answers.

    Args:
        model (`str` or `PreTrainedModel`): a mixture-of-experts language model, or its Hub id or folder.
        args ([`MoECalSFTConfig`]): training arguments.
        kwargs: everything else that `trl.SFTTrainer` takes.

    Raises:
        ValueError: the arguments, the model or a dataset cannot be trained on; the message names the remedy.

    Example:

    ```python
    trainer = MoECalSFTTrainer(
        "allenai/OLMoE-1B-7B-0924-Instruct",
        MoECalSFTConfig("out", objective="robust_filtered", metric_for_best_model="eval_medicine_sequence_ece"),
        train_dataset=answers["train"],  # columns prompt and completion
        eval_dataset={"law": answers["law"], "medicine": answers["medicine"]},
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    ```
    """

    needs_labels = False  # SFTTrainer makes them
    _predicted = Trainer.prediction_step  # SFTTrainer's runs the model a second time, for logits over all tokens

    def __init__(
        self, model: str | nn.Module | None = None, args: MoECalSFTConfig | None = None, *given: Any, **kwargs: Any
    ):
        kwargs = named_arguments(super(MoECalMixin, self).__init__, given, kwargs)
        if not isinstance(args, MoECalSFTConfig):
            raise ValueError(f"`args` must be a hf_moecal.training.sft.MoECalSFTConfig, got {type(args).__name__}.")
        if kwargs.get("peft_config") is not None and args.train != "all" and "train" not in args.filled:
            raise ValueError(
                f"`peft_config` and train={args.train!r} both choose what trains; leave `peft_config` out, or set "
                "train='all'."
            )
        if isinstance(model, str) and args.train != "all":
            model = _loaded(model, args)  # what trains is chosen in the model itself
        with warnings.catch_warnings():  # about SFTTrainer's own way to smooth labels, which is not taken here
            warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated", FutureWarning)
            super().__init__(model, args, **kwargs)
        if self._is_vision_dataset:
            raise ValueError("Datasets with images are not supported; leave the `image` or `images` column out.")
        check_arguments(args, kwargs)  # again: with PEFT under ZeRO-3 SFTTrainer sets use_reentrant=True
        config = self.model.config.get_text_config()
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False  # set by SFTTrainer; the routers are watched instead

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As [`MoECalTrainer`] does, past SFTTrainer's, which would run the model again for its figures."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        with self._judged(), self._batch(inputs, return_outputs) as batch:
            loss, outputs = Trainer.compute_loss(self, model, batch, return_outputs=True)
            self._count(outputs, tokens=ids.numel() if mask is None else mask.sum())
            return (loss, self._loss_computer.predictions(outputs)) if return_outputs else loss

    @torch.no_grad()
    def _count(self, outputs: Any, *, tokens: int | Tensor) -> None:
        """Keeps what SFTTrainer logs, of all processes."""
        figures = self._loss_computer.row_figures(outputs, _entropy_and_hit).double()
        own = torch.cat([figures.new_tensor([float(tokens), len(figures)]), figures.sum(0)])
        tokens, judged, entropy, hits = self.accelerator.gather(own[None]).sum(0).tolist()
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(tokens)
        kept = self._metrics[mode]
        kept["entropy"].append(entropy / judged if judged else 0.0)
        kept["mean_token_accuracy"].append(hits / judged if judged else 0.0)
        kept["num_tokens"] = [self._total_train_tokens]


def _loaded(model: str, args: MoECalSFTConfig) -> nn.Module:
    """The model of an id or a folder, as SFTTrainer loads it; its seed comes first there too."""
    given = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if args.parallel_mode == ParallelMode.DISTRIBUTED:
        given["device_map"] = None
    set_seed(args.seed)
    args.model_init_kwargs = None  # they have taken effect
    return create_model_from_path(model, **given)


def _entropy_and_hit(logits: Tensor, labels: Tensor) -> Tensor:
    """Entropy of each row's distribution (nats) and whether its most likely token is the label, `[n, 2]`."""
    entropy = torch.special.entr(logits.float().softmax(-1)).sum(-1)
    return torch.stack([entropy, (logits.argmax(-1) == labels).float()], dim=-1)
