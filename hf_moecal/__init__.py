"""Confidence calibration for sparse Mixture-of-Experts models of the Hugging Face Hub.

Public names are resolved on first use, so that `import hf_moecal` stays light.
"""

from importlib import import_module
from typing import Any


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
    "choice": ("ChoiceCollator",),
    "training_args": ("MoECalArguments",),
    "trainer": ("MoECalMixin", "MoECalTrainer"),
    "predictions": ("predict",),
    "answers": ("predict_answers",),
    "metrics": ("calibration_metrics", "metric_path"),
    "calibration": ("ConservativeTemperatureCalibrator", "TemperatureCalibrator"),
    "callback": ("MoECalCallback",),
    "hub": ("from_pretrained", "load_calibration"),
    "hub.joining": ("join_committee",),
    "distillation": ("distill",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
