"""`TrainingArguments` plus the fields that calibration needs; for `HfArgumentParser`, YAML and `accelerate`."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TypeVar

from transformers import TrainingArguments

from ..calibration.selection import AUTO, CANDIDATES
from ..metrics.directions import HIGHER, LOWER, NEITHER, direction_of
from ..model.lora import LORA_ALPHA, LORA_R
from ..objectives import OBJECTIVES, TAU_DISAGREEMENT, TAU_REGRET, unknown_objective
from ..readouts.mixture import Readout, parse_experts
from ..tasks import TASKS
from .methods import fill


NORMALIZERS = ("auto", "two_pass", "streaming")
TRAIN_PRESETS = ("all", "last_moe_layer", "routers", "lora")


Arguments = TypeVar("Arguments", bound=type)


def helped(arguments: Arguments) -> Arguments:
    """Gives the fields that a dataclass documents their first sentence as help on the command line."""
    sections = inspect.cleandoc(arguments.__doc__ or "").split("\nArgs:\n")
    entries = re.split(r"\n    (?=\w)", "\n" + sections[-1].split("\n\n")[0])
    parts = [entry.partition("): ") for entry in entries]
    texts = {name.split(" ", 1)[0]: re.sub(r"\s+", " ", text) for name, _, text in parts if text}
    for own in fields(arguments):
        if own.name in texts and "help" not in own.metadata:
            text = re.split(r"(?<=\w\.) (?=[A-Z])", texts[own.name])[0].replace("%", "%%")  # argparse fills in %(...)
            own.metadata = MappingProxyType({**own.metadata, "help": text[:1].upper() + text[1:]})
    return arguments


@helped
@dataclass
class MoECalArguments(TrainingArguments):
    """Arguments of [`MoECalTrainer`]: every field of `transformers.TrainingArguments`, and these.

    Args:
        method (`str`, *optional*): what fills the fields below that are left unset, see
            [`~hf_moecal.training.methods`]: `"recommended"`, the best of our benchmark (recipes/RESULTS.md);
            `"paper"`, the paper's Robust Filtered; `"erm"`, the baseline. Unset it is `"recommended"`, or, where
            `objective` is set, `"custom"`: that objective on the model's own prediction. Where a part of a method
            cannot run on a model, it falls back, and training begins with a line that says so.
        objective (`str`, *optional*): set by `method`. `"erm"`, `"robust"`, `"robust_filtered"`, or a baseline,
            `"label_smoothing"` (with `label_smoothing_factor`, 0.1 if unset) or `"focal"`.
        eta (`float`, *optional*): set by `method`. Tilt of the adversarial weights softmax(eta * loss).
        detach_weights (`bool`, *optional*, defaults to `True`): whether the weights are constants for the gradient.
        robust_warmup_ratio (`float`, *optional*): set by `method`. Share of the optimizer steps that run ERM first.
        eta_ramp_ratio (`float`, *optional*, defaults to 0.0): share of the steps, after the warm-up, over which eta
            grows linearly from 0.
        normalizer (`str`, *optional*, defaults to `"auto"`): how the tilted weights of a batch over several
            accumulation steps are normalised; all ways give the same gradient. `"two_pass"` measures the losses of all
            micro-batches but one before it back-propagates them: an extra forward each. `"streaming"` runs each once:
            `"robust"` with detached weights divides the gradient at the end (needs bf16 or fp32), the other
            objectives hold the activations of all micro-batches, as much memory as one large batch takes, which
            activation checkpointing, or training the last layers only, keeps small. `"auto"` takes `"streaming"`
            where it needs no more memory, and prints what it took.
        tau_regret (`float`, *optional*, defaults to 1e-6): regret (nats) above which an example is routing-relevant.
        tau_disagreement (`float`, *optional*, defaults to 0.01): the same for disagreement.
        relevance_quantile (`float`, *optional*): instead of the two thresholds, the share of the batch with the
            largest regret together with the share with the largest disagreement.
        focal_gamma (`float`, *optional*, defaults to 2.0): exponent of the focal loss.
        probe_layer (`int`, *optional*, defaults to -1): MoE layer whose experts are probed, an index into
            `find_moe_layers(model)`.
        readout (`str`, *optional*): set by `method`. What the losses and predictions are of: `"native"`, the model's
            own prediction, or the probabilities of the last MoE layer's experts, mixed: `"mixture"` (those selected)
            or `"soft_mixture"` (all, with the router's full distribution); see
            [`~hf_moecal.readouts.mixture.Readout`].
        readout_experts (`int` or `"auto"`, *optional*): with `readout="soft_mixture"`, mix only so many, those with
            the largest shares; `"auto"` takes for each token the fewest that hold .99 of the router's mass.
        readout_members (`int`, *optional*): set by `method`. Trains a committee of so many last MoE layers, each with
            its own final norm and head, on the frozen layers that they share, and mixes their predictions in equal
            shares. Each trains by the objective of its own losses, as if alone, so the training loss is the sum over
            the members, and `max_grad_norm` bounds the norm of all their gradients together. Needs
            `train="last_moe_layer"`; see [`~hf_moecal.readouts.committee.add_members`].
        expert_loss_weight (`float`, *optional*, defaults to 0.0): weight of the mean over the examples of what each
            expert of the mixture loses on its own, sum_k r_k l^(k), beside the objective.
        task (`str`, *optional*, defaults to `"classification"`): `"classification"` (a sequence-classification head),
            `"choice"` (a causal language model scored over answer options, see [`ChoiceCollator`]) or `"lm"` (a
            causal language model, labels at supervised positions).
        example (`str`, *optional*, defaults to `"sequence"`): for `task="lm"`, what counts as one example of the
            objective: a `"sequence"` (mean over its supervised tokens) or a `"token"`.
        train (`str`, *optional*): set by `method`. What trains: `"all"` that is not frozen already,
            `"last_moe_layer"` (router and experts of the last MoE layer, the final norm and the head), `"routers"`
            (those of all MoE layers) or `"lora"` (an adapter on the attention and the experts of all MoE layers, see
            [`~hf_moecal.model.lora.lora_config`]). With the last two the head of a classifier trains too.
        lora_r (`int`, *optional*, defaults to 16): for `train="lora"`, the adapter's rank.
        lora_alpha (`int`, *optional*, defaults to 32): for `train="lora"`, its scale times `lora_r`.
        router_aux_loss_coef (`float`, *optional*): weight of the routers' load-balancing loss, which is added to the
            objective outside the tilt: the mean over the micro-batches of all processes, each balanced over its own
            real tokens as transformers does. Unset: the model's own weight where a router trains, else 0; with
            `prefix_cache` 0, since the routers then see the judged tokens only.
        calibration_method (`str`, *optional*): set by `method`. What [`MoECalTrainer.calibrate`] fits on validation
            rows: a method of `moecal calibrate`, or `"none"`.
        prefix_cache (`str`, *optional*): folder for the hidden states of the frozen layers, computed once and replayed
            in every epoch. Needs `train="last_moe_layer"`.
        prefix_cache_dtype (`str`, *optional*): precision in which the frozen layers run for the cache, for example
            `"bfloat16"`; the model's own if unset.

    Raises:
        ValueError: a field is out of range; the message names the range.

    Example:

    ```python
    >>> from hf_moecal import MoECalArguments
    >>> MoECalArguments("out", objective="robust", eta=1.0, report_to="none").eta_at(0.2)  # still warming up
    0.0

    ```
    """

    method: str | None = None
    objective: str | None = None
    eta: float | None = None
    detach_weights: bool = True
    robust_warmup_ratio: float | None = None
    eta_ramp_ratio: float = 0.0
    normalizer: str = "auto"
    tau_regret: float = TAU_REGRET
    tau_disagreement: float = TAU_DISAGREEMENT
    relevance_quantile: float | None = None
    focal_gamma: float = 2.0
    probe_layer: int = -1
    readout: str | None = None
    readout_experts: int | str | None = None
    readout_members: int | None = None
    expert_loss_weight: float = 0.0
    task: str = "classification"
    example: str = "sequence"
    train: str | None = None
    lora_r: int = LORA_R
    lora_alpha: int = LORA_ALPHA
    router_aux_loss_coef: float | None = None
    calibration_method: str | None = None
    prefix_cache: str | None = None
    prefix_cache_dtype: str | None = None

    def __post_init__(self):
        fill(self)
        self.check()
        if self.greater_is_better is None and self.metric_for_best_model:
            # TrainingArguments would take any metric that is no loss for a score.
            self.greater_is_better = {LOWER: False, HIGHER: True}.get(direction_of(self.metric_for_best_model))
        super().__post_init__()

    def check(self) -> None:
        """Raises a `ValueError` for a field that is out of range, or has no effect beside another."""
        if self.objective not in OBJECTIVES:
            raise unknown_objective(self.objective)
        _among("normalizer", self.normalizer, NORMALIZERS)
        _among("task", self.task, TASKS)
        _among("example", self.example, ("sequence", "token"))
        _among("train", self.train, TRAIN_PRESETS)
        _among("calibration_method", self.calibration_method, (*CANDIDATES, AUTO))
        _within("eta", self.eta, 0, float("inf"), "the paper uses 2.0, and 0 is ERM")
        _within("robust_warmup_ratio", self.robust_warmup_ratio, 0, 1, "the paper uses 0.4")
        _within("eta_ramp_ratio", self.eta_ramp_ratio, 0, 1, "0 switches the tilt on at once")
        _within("tau_regret", self.tau_regret, 0, float("inf"), f"the paper uses {TAU_REGRET}")
        _within("tau_disagreement", self.tau_disagreement, 0, float("inf"), f"the paper uses {TAU_DISAGREEMENT}")
        _within("focal_gamma", self.focal_gamma, 0, float("inf"), "2.0 is usual")
        self._check_readout()
        if self.router_aux_loss_coef is not None:
            _within("router_aux_loss_coef", self.router_aux_loss_coef, 0, float("inf"), "0 is none")
        for name, default in (("lora_r", LORA_R), ("lora_alpha", LORA_ALPHA)):
            _within(name, getattr(self, name), 1, float("inf"), f"{default} is usual")
            if self.train != "lora" and getattr(self, name) != default:
                raise ValueError(
                    f"`{name}` has no effect on train={self.train!r}; leave it unset or set train='lora'."
                )
        if self.relevance_quantile is not None and not 0 < self.relevance_quantile <= 1:
            raise ValueError(
                f"`relevance_quantile` must lie in (0, 1], got {self.relevance_quantile}; 0.3 keeps the top 30 %."
            )
        if (self.metric_for_best_model or "").endswith("signed_gap"):
            raise ValueError(
                "`metric_for_best_model` cannot be a signed gap, which is best at 0; choose the ece or nll of the set."
            )
        if self.greater_is_better is None and direction_of(self.metric_for_best_model or "") == NEITHER:
            raise ValueError(
                f"`metric_for_best_model={self.metric_for_best_model!r}` has no better side; choose the ece or nll of "
                "the set, or say which side you want with greater_is_better."
            )
        if self.objective == "label_smoothing":
            self.label_smoothing_factor = self.label_smoothing_factor or 0.1
        elif self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor={self.label_smoothing_factor}` has no effect on objective="
                f"{self.objective!r}; set it to 0, or choose objective='label_smoothing'."
            )
        if self.prefix_cache is not None and self.train != "last_moe_layer":
            raise ValueError(
                f"`prefix_cache` needs frozen first layers, but train={self.train!r} updates them; "
                "set train='last_moe_layer' or leave `prefix_cache` unset."
            )
        if self.prefix_cache is not None and self.neftune_noise_alpha is not None:
            raise ValueError(
                "`prefix_cache` keeps what the embeddings gave once, and `neftune_noise_alpha` adds fresh noise to "
                "them; leave one of the two unset."
            )

    def _check_readout(self) -> None:
        self.readout_experts = parse_experts(self.readout_experts)
        Readout(self.readout, self.readout_experts)
        _within("expert_loss_weight", self.expert_loss_weight, 0, float("inf"), "0 leaves the experts to the mixture")
        if self.expert_loss_weight and self.readout == "native":
            raise ValueError(
                f"`expert_loss_weight={self.expert_loss_weight}` needs experts that predict; set readout='mixture' or "
                "'soft_mixture', or the weight to 0."
            )
        last = f"readout={self.readout!r}" if self.readout != "native" else f"readout_members={self.readout_members}"
        if (self.readout != "native" or self.readout_members > 1) and self.probe_layer != -1:
            raise ValueError(f"{last} is of the last MoE layer, got probe_layer={self.probe_layer}; leave it at -1.")
        if not (isinstance(self.readout_members, int) and self.readout_members >= 1):
            raise ValueError(f"`readout_members` must be a whole number, 1 or more, got {self.readout_members!r}.")
        if self.readout_members > 1 and self.train != "last_moe_layer":
            raise ValueError(
                f"readout_members={self.readout_members} trains copies of the last MoE layer on frozen layers that "
                f"they share, got train={self.train!r}; set train='last_moe_layer'."
            )
        if self.readout_members > 1 and self.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef} would balance the routers of the first member "
                "only; with `readout_members` above 1 leave it unset or set it to 0."
            )

    @property
    def is_robust(self) -> bool:
        """Whether the objective tilts the batch, so that its coefficients depend on the losses."""
        return self.objective in ("robust", "robust_filtered")

    def eta_at(self, progress: float) -> float:
        """eta after the given share of training (0 to 1): 0 in the warm-up, then the ramp, then `eta`."""
        after = progress - self.robust_warmup_ratio
        if not self.is_robust or after < 0:
            return 0.0
        return self.eta if after >= self.eta_ramp_ratio else self.eta * after / self.eta_ramp_ratio


def _among(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")


def _within(name: str, value: float, low: float, high: float, hint: str) -> None:
    if not (low <= value <= high and value != float("inf")):
        right = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"`{name}` must be a finite number {right}, got {value}; {hint}.")
