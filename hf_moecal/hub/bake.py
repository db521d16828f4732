"""Make a temperature part of a checkpoint's weights, so that any runtime gives the calibrated probabilities.

No table of families says how: the ways to scale all logits by one factor are tried in order on real input, and one is
taken only if it is exact there. A factor that is a power of two is exact in floating point, so a softcap or anything
else between the scaled tensor and the logits that is not linear shows as a difference far above rounding.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..calibration import TemperatureCalibrator, from_record, read_record, write_record
from ..calibration.base import TOKEN_SCORING
from ..model.loading import ADAPTER_CONFIG, load_model
from ..readouts.mixture import Readout
from ..readouts.recorded import check_fresh, weights_record


if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TEXTS = (
    "The plot is thin, yet the two leads carry it with ease.",
    "Shipping took three weeks and the box was damaged.",
    "In 1969 a crew of three flew to the Moon; two of them walked on it.",
    "def mean(values): return sum(values) / len(values)",
    "Wer lesen kann, ist klar im Vorteil.",
)
_CONFIG_SCALES = {"logits_scaling": -1, "logit_scale": 1}
"""Config fields that scale the logits, and the power with which: the first divides, the second multiplies."""
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.png", "*.svg")
_NOT_COPIED = ("config.json", "*.index.json", "calibration.json", "trainer_state.json", "training_args*")
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_PROBES = {torch.float16: 2.0**4}


class _Way(NamedTuple):
    """One way to multiply all logits by a factor; `scale(1)` restores the model exactly."""

    name: str
    tensors: tuple[str, ...]
    scale: Callable[[float], None]


def bake(
    model_dir: str | Path,
    *,
    output_dir: str | Path,
    texts: Sequence[str] | None = None,
    tolerance: float | None = None,
) -> Path:
    """Writes a copy of a checkpoint whose logits are already divided by the temperature in its `calibration.json`.

    The temperature goes into the config's own logit scale where there is one, else into the final norm (which works
    with tied embeddings), else into the head. The copy is loaded again and compared with the original on real text:
    logits divided by T within `tolerance`, the same argmax. Its `calibration.json` says so, and then
    [`~hf_moecal.hub.from_pretrained`] and `bake` do not apply it again.

    Args:
        model_dir: folder with a checkpoint and its `calibration.json`.
        output_dir: folder to write, new or empty.
        texts: what to compare on. Default: five sentences, or spread-out token ids when there is no tokenizer.
        tolerance: largest difference allowed, relative to the largest logit. Default: 1e-5 in float32; 2e-2 in
            bfloat16 and 5e-3 in float16, whose weights cannot hold the quotient more exactly.

    Returns:
        The path of `output_dir`.

    Raises:
        ValueError: there is no temperature to bake, it is of other weights or baked already, no way is exact, or the
            folder is in use.
    """
    model_dir, output_dir = Path(model_dir), Path(output_dir)
    record, calibrator = _bakeable(model_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{str(output_dir)!r} is not an empty folder; give a new one, so that nothing is mixed up.")
    model = load_model(model_dir, dtype="auto")
    tolerance = _TOLERANCE.get(model.dtype, 1e-5) if tolerance is None else tolerance
    inputs = _inputs(model_dir, model, texts)
    reference = _logits(model, inputs)
    way = _exact_way(model, inputs, reference)
    way.scale(1.0 / calibrator.temperature)
    place, tensors = way.name, list(way.tensors)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as scratch:
        target = Path(scratch) / "checkpoint"
        model.save_pretrained(target)
        del model, way  # a large model must not be held twice
        _copy_companions(model_dir, target)
        wanted = [logits / calibrator.temperature for logits in reference]
        error = _compared(_logits(load_model(target, dtype="auto"), inputs), wanted, place, tolerance)
        baked = {
            "into": place,
            "tensors": tensors,
            "largest_difference": error,
            "tolerance": tolerance,
            "sequences": len(inputs),
        }
        write_record(target, replace(record, baked=baked, weights=weights_record(target)))
        if output_dir.exists():
            output_dir.rmdir()
        os.replace(target, output_dir)
    return output_dir


def _bakeable(model_dir: Path):
    record = read_record(model_dir)
    calibrator = from_record(record)  # refuses a second time
    check_fresh(record, model_dir)
    readout = Readout.from_record(record.readout)
    if not readout.is_plain:
        raise ValueError(
            f"This checkpoint's calibration is of its readout {readout.name!r}, which no weights of one model give; "
            "keep calibration.json beside the weights, or distill it into the native readout (`moecal distill`)."
        )
    if not isinstance(calibrator, TemperatureCalibrator):
        raise ValueError(
            f"Method {record.method!r} cannot become part of the weights: only one temperature for all rows is a "
            "plain factor on the logits. Keep calibration.json beside the weights, or use method='temperature'."
        )
    if record.scoring not in (None, TOKEN_SCORING):
        raise ValueError(
            f"This temperature was fitted on whole answer options scored by {record.scoring!r}. In the weights it "
            "would divide the logits of every token, which is another model with other answers. Keep calibration.json "
            "beside the weights: hf_moecal.predict applies it to the options' scores."
        )
    if (model_dir / ADAPTER_CONFIG).exists():
        raise ValueError(
            "A LoRA adapter has no head or final norm of its own to hold a temperature; merge it into its base model "
            "first (peft: model.merge_and_unload(), then save_pretrained)."
        )
    return record, calibrator


def _inputs(model_dir: Path, model: PreTrainedModel, texts: Sequence[str] | None) -> list[Tensor]:
    """One sequence of token ids per text, without padding."""
    if texts is None and not any(model_dir.glob("tokenizer*")):
        size = model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(size, (1, length), generator=generator) for length in (3, 8, 16)]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    return [tokenizer(text, return_tensors="pt")["input_ids"] for text in (texts if texts is not None else _TEXTS)]


@torch.no_grad()
def _logits(model: PreTrainedModel, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu() for ids in inputs]


def _exact_way(model: PreTrainedModel, inputs: Sequence[Tensor], reference: Sequence[Tensor]) -> _Way:
    """The first way that multiplies the logits by a power of two and does nothing else."""
    factor = _PROBES.get(model.dtype, 2.0**10)
    differences = []
    for way in _ways(model, inputs[0]):
        try:
            way.scale(factor)
            scaled = _logits(model, inputs)
        finally:
            way.scale(1.0)
        difference = max(_difference(got / factor, want) for got, want in zip(scaled, reference, strict=True))
        if difference < 1e-5:
            return way
        differences.append(f"{way.name} is off by {difference:.1g}")
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    why = f"its logits are capped at {cap:g} after the head" if cap else "something after the final norm is not linear"
    raise ValueError(
        f"The temperature of {type(model).__name__} cannot be baked exactly: {why} ({'; '.join(differences)}). "
        "Keep calibration.json beside the weights and load with hf_moecal.hub.from_pretrained."
    )


def _ways(model: PreTrainedModel, ids: Tensor) -> Iterator[_Way]:
    """Ways to scale the logits: the config's own scale, the final norm (two conventions), the head."""
    for name, power in _CONFIG_SCALES.items():
        if isinstance(getattr(model.config, name, None), int | float):
            yield _Way(f"config.{name}", (), _config_setter(model, name, power))
    order = _executed(model, ids)
    head = next((name for name in reversed(order) if isinstance(order[name], nn.Linear)), None)
    norm = next((name for name in reversed(order) if order[name].weight.dim() == 1), None)
    after = {} if head is None or order[head].bias is None else {f"{head}.bias": order[head].bias}
    if norm is not None:
        own = {f"{norm}.{key}": value for key, value in order[norm].named_parameters(recurse=False)}
        yield _Way("final norm", (*own, *after), _tensor_setter({**own, **after}))
        weight = {f"{norm}.weight": order[norm].weight}  # as in Gemma, whose norm multiplies by 1 + weight
        rest = {key: value for key, value in {**own, **after}.items() if key not in weight}
        yield _Way("final norm (1 + weight)", (*own, *after), _tensor_setter(rest, shifted=weight))
    embeddings = model.get_input_embeddings()
    if head is not None and order[head].weight is not embeddings.weight:
        own = {f"{head}.weight": order[head].weight}
        yield _Way("head", (*own, *after), _tensor_setter({**own, **after}))


def _config_setter(model: PreTrainedModel, name: str, power: int) -> Callable[[float], None]:
    original = getattr(model.config, name)
    own = getattr(model, name, None)  # some models read the config once, when they are built

    def scale(factor: float) -> None:
        value = original if factor == 1.0 else original * factor**power
        setattr(model.config, name, value)
        if own is not None:
            setattr(model, name, value)

    return scale


def _tensor_setter(plain: dict[str, Tensor], shifted: dict[str, Tensor] | None = None) -> Callable[[float], None]:
    shifted = shifted or {}
    originals = {key: value.detach().clone() for key, value in {**plain, **shifted}.items()}

    @torch.no_grad()
    def scale(factor: float) -> None:
        for key, tensor in plain.items():
            tensor.copy_(originals[key] if factor == 1.0 else originals[key].double() * factor)
        for key, tensor in shifted.items():
            tensor.copy_(originals[key] if factor == 1.0 else (originals[key].double() + 1) * factor - 1)

    return scale


def _executed(model: PreTrainedModel, ids: Tensor) -> dict[str, nn.Module]:
    """Modules with a weight of their own, in the order in which a forward pass last used them."""
    order: dict[str, nn.Module] = {}

    def note(name: str) -> Callable:
        def hook(module: nn.Module, *_: object) -> None:
            order.pop(name, None)
            order[name] = module

        return hook

    weighted = [(name, module) for name, module in model.named_modules() if _has_weight(module)]
    handles = [module.register_forward_hook(note(name)) for name, module in weighted]
    try:
        _logits(model, [ids])
    finally:
        for handle in handles:
            handle.remove()
    return order


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), nn.Parameter)


def _difference(got: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest wanted logit; infinite where anything is not finite."""
    if not torch.isfinite(got).all():
        return float("inf")
    return ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)).item()


def _compared(got: Sequence[Tensor], wanted: Sequence[Tensor], place: str, tolerance: float) -> float:
    """Largest difference between the reloaded copy and the target.

    Raises:
        ValueError: it is above the tolerance, or another class comes out on top by more than rounding.
    """
    pairs = list(zip(got, wanted, strict=True))
    error = max(_difference(a, b) for a, b in pairs)
    if not error <= tolerance:
        raise ValueError(
            f"Baking into the {place} changed the logits by {error:.2g} instead of scaling them exactly (allowed "
            f"{tolerance:g}); nothing was written. Bake a float32 copy, or keep calibration.json beside the weights."
        )
    for a, b in pairs:
        at_new = b.gather(-1, a.argmax(dim=-1, keepdim=True))[..., 0]
        lost = (b.max(dim=-1).values - at_new).max().item()
        if lost > 2 * error * b.abs().max().item():
            raise ValueError(f"Baking into the {place} changed a prediction; nothing was written.")
    return error


def _copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, card and figures; weights and config come from the model, and pickles stay behind."""
    for pattern in _COPIED:
        for file in sorted(source.glob(pattern)):
            kept = not any(file.match(other) for other in _NOT_COPIED)
            if kept and file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
