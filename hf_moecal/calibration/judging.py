"""What calibrators do to rows that they were not fitted on: figures of each row, held out fold by fold, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hf_moecal.calibration.base import Calibrator
from hf_moecal.calibration.rows import Rows
from hf_moecal.metrics.rows import reduce_batch


NLL = 2  # among the figures of each row
LARGEST_LOSS = -float(np.log(np.finfo(np.float64).tiny))
_ELEMENTS = 1 << 21  # probabilities in memory at once


def held_out(
    builders: Mapping[str, Callable[[], Calibrator]],
    rows: Rows,
    assignment: np.ndarray,
    skipped: dict[str, str],
    *,
    strict: bool,
    progress: bool,
) -> dict[str, np.ndarray]:
    """Figures of each row, `[4, n]`, by each method fitted on the other folds; what fails is noted in `skipped`."""
    from tqdm.auto import tqdm

    judged = {name: np.empty((4, len(rows))) for name in builders if name not in skipped}
    folds = int(assignment.max()) + 1
    with tqdm(total=folds * len(judged), desc="calibrate", unit="fit", disable=not progress, delay=1) as bar:
        for fold in range(folds):
            inside = assignment == fold
            fitting, held_out = rows.part(~inside), rows.part(inside)
            for name in list(judged):
                try:
                    judged[name][:, inside] = judge(builders[name]().fit_rows(fitting), held_out)
                except ValueError as error:
                    if strict:
                        raise
                    skipped[name] = str(error).split(". ")[0].split("; ")[0]
                    del judged[name]
                bar.update()
    return judged


def row_losses(calibrator: Calibrator, rows: Rows) -> np.ndarray:
    return np.minimum(judge(calibrator, rows)[NLL], LARGEST_LOSS)


def judge(calibrator: Calibrator, rows: Rows) -> np.ndarray:
    """Confidence, whether the prediction is right, loss and Brier score of each row, `[4, n]`, in pieces."""
    result = np.empty((4, len(rows)))
    step = max(1, _ELEMENTS // rows.logits.shape[1])
    for start in range(0, len(rows), step):
        part = rows.part(slice(start, start + step))
        probs = np.exp(calibrator.log_probs(part))
        found, _ = reduce_batch(part.labels, probs=probs / probs.sum(axis=1, keepdims=True))
        result[:, start : start + step] = found.confidence, found.event, found.nll, found.brier
    return result
