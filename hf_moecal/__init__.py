"""Confidence calibration for sparse Mixture-of-Experts models of the Hugging Face Hub.

Public names are resolved on first use, so that `import hf_moecal` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:  # what type checkers and editors see; `_PUBLIC` is what runs
    from .calibration import ConservativeTemperatureCalibrator as ConservativeTemperatureCalibrator
    from .calibration import TemperatureCalibrator as TemperatureCalibrator
    from .hub import from_pretrained as from_pretrained
    from .hub import load_calibration as load_calibration
    from .hub.joining import join_committee as join_committee
    from .metrics import calibration_metrics as calibration_metrics
    from .metrics import metric_path as metric_path
    from .objectives import erm as erm
    from .objectives import robust as robust
    from .objectives import robust_filtered as robust_filtered
    from .objectives import routing_relevance as routing_relevance
    from .predictions import predict as predict
    from .predictions.answers import predict_answers as predict_answers
    from .probes import MoELayer as MoELayer
    from .probes import RoutingRecord as RoutingRecord
    from .probes import UnsupportedMoEError as UnsupportedMoEError
    from .probes import find_moe_layers as find_moe_layers
    from .probes import hard_routing as hard_routing
    from .probes import probe_experts as probe_experts
    from .probes import routing_statistics as routing_statistics
    from .tasks.choice import ChoiceCollator as ChoiceCollator
    from .training.arguments import MoECalArguments as MoECalArguments
    from .training.callback import MoECalCallback as MoECalCallback
    from .training.distillation import distill as distill
    from .training.trainer import MoECalMixin as MoECalMixin
    from .training.trainer import MoECalTrainer as MoECalTrainer


__version__ = "0.1.0"

_PUBLIC = {
    "objectives": ("erm", "robust", "robust_filtered", "routing_relevance"),
    "probes": (
        "MoELayer",
        "RoutingRecord",
        "UnsupportedMoEError",
        "find_moe_layers",
        "hard_routing",
        "probe_experts",
        "routing_statistics",
    ),
    "tasks.choice": ("ChoiceCollator",),
    "predictions": ("predict",),
    "predictions.answers": ("predict_answers",),
    "metrics": ("calibration_metrics", "metric_path"),
    "calibration": ("ConservativeTemperatureCalibrator", "TemperatureCalibrator"),
    "training.arguments": ("MoECalArguments",),
    "training.trainer": ("MoECalMixin", "MoECalTrainer"),
    "training.callback": ("MoECalCallback",),
    "training.distillation": ("distill",),
    "hub": ("from_pretrained", "load_calibration"),
    "hub.joining": ("join_committee",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
