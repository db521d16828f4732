"""Calibration error as an `evaluate` module; the arithmetic is that of `hf_moecal.metrics`."""

import inspect

import datasets
import evaluate

from hf_moecal.metrics import CalibrationAccumulator
from hf_moecal.metrics.iteration import abandoned, current_iteration
from hf_moecal.metrics.state import from_bytes, to_bytes


_DESCRIPTION = """
Says whether a classifier's probabilities can be trusted: expected calibration error with its uncertainty and its noise
floor, by group, with the proper scores next to it.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: probabilities, one row per example and one column per class; with mode="positive_class" also one
        number per example, the probability of class 1.
    references: class of each example (-100: none, ignored and counted), or for each class the fraction of raters.
    groups: name of each example's group, or a dict of such columns.
    from_logits (bool): predictions are scores before the softmax. They are never guessed to be.
    renormalize (bool): divide each row by its sum, for probabilities that were written with few decimals.
    mode (str): "top_label" (default), "classwise" or "positive_class"; also load(..., config_name=mode).
    sample_weight: how much each example counts, one number each.
    bins (int), strategy ("equal_width" or "equal_mass"), intervals (bool), ranked (bool), group_names,
    intersections (bool): as in hf_moecal.metrics.calibration_report.
Returns:
    dict: "ece" first, then the further keys of hf_moecal.metrics.calibration_report.
Examples:
    >>> import evaluate
    >>> import hf_moecal
    >>> metric = evaluate.load(hf_moecal.metric_path("ece"))
    >>> metric.compute(predictions=[[1.0, 0.0], [1.0, 0.0]], references=[0, 1])["ece"]
    0.5
"""

_CITATION = """
@inproceedings{kumar2019verified,
  title={Verified Uncertainty Calibration},
  author={Kumar, Ananya and Liang, Percy and Ma, Tengyu},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}
"""

_MODES = ("top_label", "classwise", "positive_class")
_SETUP = ("group_names", "intersections")
_REPORT = ("bins", "strategy", "intervals", "ranked")
_STATE = datasets.Features({"state": datasets.Value("large_binary")})


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ECE(evaluate.Metric):
    """Expected calibration error.

    Arithmetic runs on arrays, not through an Arrow file: a batch is reduced as it is added. Only with
    `num_process > 1` does each process write what it collected to evaluate's cache file, where process 0 merges it.
    """

    def __init__(self, config_name=None, **kwargs):
        self._mode = None if config_name in (None, "default") else config_name
        if self._mode is not None and self._mode not in _MODES:
            raise ValueError(f"config_name must be one of {', '.join(map(repr, _MODES))}, got {config_name!r}.")
        unknown = sorted(set(kwargs) - set(inspect.signature(evaluate.EvaluationModule.__init__).parameters))
        if unknown:
            raise ValueError(f"load() got an unknown keyword {unknown[0]!r}; give options of the metric to compute().")
        self._pending = self._iteration = None
        super().__init__(config_name=config_name, **kwargs)

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=[
                datasets.Features(
                    {
                        "predictions": datasets.Sequence(datasets.Value("float64")),
                        "references": datasets.Value("int64"),
                    }
                ),
                datasets.Features({"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}),
            ],
            reference_urls=["https://arxiv.org/abs/1909.10155", "https://arxiv.org/abs/2309.12236"],
        )

    def __len__(self):
        return 0 if self._pending is None else len(self._pending)

    def add(
        self,
        *,
        prediction=None,
        reference=None,
        group=None,
        from_logits=False,
        renormalize=False,
        sample_weight=None,
        mode=None,
        predictions=None,
        references=None,
        **kwargs,
    ):
        """Adds one example.

        Args:
            prediction: probabilities of one example.
            reference: its class.
            group: its group.
            from_logits: the prediction is scores before the softmax.
            renormalize: divide it by its sum.
            sample_weight: how much it counts.
            mode: see below.
            predictions: what `evaluate.combine` calls `prediction`.
            references: what `evaluate.combine` calls `reference`.
        """
        _refuse(kwargs, "add")
        prediction = predictions if prediction is None else prediction
        reference = references if reference is None else reference
        groups = None if group is None else [group]
        self.add_batch(
            predictions=_one(prediction),
            references=_one(reference),
            groups=groups,
            from_logits=from_logits,
            renormalize=renormalize,
            sample_weight=_one(sample_weight),
            mode=mode,
        )

    def add_batch(
        self,
        *,
        predictions=None,
        references=None,
        groups=None,
        from_logits=False,
        renormalize=False,
        sample_weight=None,
        mode=None,
        **kwargs,
    ):
        """Adds a batch of examples.

        Args:
            predictions: probabilities of each example.
            references: class of each example.
            groups: group of each example, or a dict of group columns.
            from_logits: predictions are scores before the softmax.
            renormalize: divide each row by its sum.
            sample_weight: how much each example counts.
            mode: see below; one mode for all batches.
        """
        _refuse(kwargs, "add_batch")
        if abandoned(self._iteration, current_iteration()):
            self.reset()
        self._iteration = current_iteration()
        batch = self._reduce(predictions, references, groups, mode, from_logits, renormalize, sample_weight)
        self._pending = batch if self._pending is None else _merged(self._pending, batch)
        if self.num_process > 1 and self.writer is None:
            self._meet()

    def reset(self):
        """Forgets what was added. Needed only after a loop that was interrupted; one over a dataloader that accelerate
        prepared is noticed without it."""
        self._pending = None

    def compute(
        self,
        *,
        predictions=None,
        references=None,
        groups=None,
        from_logits=False,
        renormalize=False,
        sample_weight=None,
        mode=None,
        **kwargs,
    ):
        """Computes every figure on what was added, and forgets it. If it raises, what was added before is kept.

        Args:
            predictions: probabilities of each example, added before computing.
            references: class of each example.
            groups: group of each example, or a dict of group columns.
            from_logits: predictions are scores before the softmax.
            renormalize: divide each row by its sum.
            sample_weight: how much each example counts.
            mode: see below.
        """
        _refuse({name: kwargs[name] for name in kwargs if name not in _REPORT + _SETUP}, "compute")
        setup = {name: kwargs.pop(name) for name in _SETUP if name in kwargs}
        collected = self._pending
        if predictions is not None or references is not None:
            batch = self._reduce(predictions, references, groups, mode, from_logits, renormalize, sample_weight)
            collected = batch if collected is None else _merged(collected, batch)
        elif from_logits or renormalize or groups is not None or sample_weight is not None:
            raise ValueError(
                "groups, from_logits, renormalize and sample_weight describe predictions; give them to add_batch."
            )
        elif collected is not None:
            self._check_mode(collected, mode)
        if self.num_process > 1:
            return self._compute_together(collected, setup, kwargs)
        if collected is None:
            raise ValueError("nothing to compute; give predictions and references, or call add_batch first.")
        found = _report(collected, setup, kwargs)
        self._pending = None
        return found

    def _reduce(self, predictions, references, groups, mode, from_logits, renormalize, sample_weight):
        if predictions is None or references is None:
            missing = "predictions" if predictions is None else "references"
            raise ValueError(f"{missing} are missing; calibration compares predictions with references.")
        if not isinstance(from_logits, bool):
            raise ValueError(f"from_logits must be True or False, got {from_logits!r}.")
        batch = CalibrationAccumulator(mode=mode or self._mode or "top_label")
        if self._pending is not None:
            self._check_mode(self._pending, batch.mode)
        given = {"logits" if from_logits else "probs": predictions}
        batch.add(references, groups=groups, renormalize=renormalize, sample_weight=sample_weight, **given)
        return batch

    def _check_mode(self, collected, mode):
        if mode is not None and mode != collected.mode:
            raise ValueError(f"batches were added with mode={collected.mode!r}, not {mode!r}; use one mode for all.")

    def _meet(self):
        """Announces this process to the others, as evaluate does on the first batch."""
        self.selected_feature_format = _STATE
        self._init_writer()

    def _compute_together(self, collected, setup, options):
        if self.writer is None:
            self._meet()
        self.writer.write({"state": to_bytes(collected or CalibrationAccumulator(mode=self._mode or "top_label"))})
        self._finalize()
        self.cache_file_name = self.filelock = self.selected_feature_format = self._pending = None
        if self.process_id != 0:
            return None
        try:
            parts = [from_bytes(state) for state in self.data["state"]]
            parts = [part for part in parts if len(part)] or parts[:1]
            return _report(_merged(*parts), setup, options)
        finally:
            self._release()

    def _release(self):
        """Removes the files of all processes and lets go of their locks, process 0 last."""
        self.data = self.writer = None
        for lock, path in reversed(list(zip(self.filelocks, self.file_paths, strict=True))):
            evaluate.module.os.remove(path)
            lock.release()


def _one(value):
    return None if value is None else [value]


def _refuse(kwargs, method):
    if kwargs:
        raise ValueError(
            f"{method}() got an unknown keyword {sorted(kwargs)[0]!r}; the docstring lists all there are."
        )


def _merged(*parts, setup=None):
    whole = CalibrationAccumulator(mode=parts[0].mode, **(setup or {}))
    for part in parts:
        whole.merge(part)
    return whole


def _report(collected, setup, options):
    return (_merged(collected, setup=setup) if setup else collected).report(**options)
