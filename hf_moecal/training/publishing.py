"""What a trainer writes beside the weights and publishes with them: how it trained, on what, how it did."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..hub.checkpoint_files import EVALUATION_FILE, load_evaluation, write_evaluation, write_training_record
from ..metrics.compute_metrics import FLAT
from ..readouts.recorded import stale


class PublishingMixin:
    """The part of [`~hf_moecal.training.trainer.MoECalMixin`] that is about the finished checkpoint."""

    _evaluated: dict[str, tuple[int, dict[str, Any]]] | None = None
    """Name of a set -> the step at which it was evaluated, and its figures."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates as `Trainer.evaluate` does, and remembers the calibration figures for the model card."""
        metrics = super().evaluate(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[2] if len(args) > 2 else "eval")
        figures = {name: metrics[f"{prefix}_{name}"] for name in FLAT if f"{prefix}_{name}" in metrics}
        if {"ece", "n"} <= set(figures):  # not for several sets, each of which comes here by itself
            name = prefix.removeprefix("eval").removeprefix("_") or "evaluation"
            self._evaluated = {
                **(self._evaluated or {}),
                name: (self.state.global_step, {**figures, "n": int(figures["n"])}),
            }
        return metrics

    def keep_evaluations_of(self, checkpoint: str) -> None:
        """Says that the model is now that of an earlier checkpoint, and its evaluations are those of that step."""
        step = int(checkpoint.rpartition("-")[2])
        found = self._evaluated or {}
        now = self.state.global_step
        self._evaluated = {name: (now, figures) for name, (at, figures) in found.items() if at == step}

    def save_evaluation(self) -> None:
        """Writes the figures of the evaluations of the model as it is beside its weights, if there are any.

        Sets that [`~hf_moecal.hub.checkpoint_files.write_evaluation`] recorded of these weights stay as they are;
        those of other weights go, with a warning.
        """
        if not self.is_world_process_zero():
            return
        folder, evaluated = Path(self.args.output_dir), self._evaluated or {}
        own: Mapping[str, Any] = load_evaluation(folder) or {}
        reason = stale(own.get("weights"), folder)
        if reason is not None:
            warnings.warn(f"The figures in {EVALUATION_FILE} are dropped: {reason}.")
            (folder / EVALUATION_FILE).unlink()
            own = {}
        found = {name: figures for name, (step, figures) in evaluated.items() if step == self.state.global_step}
        if found:
            sets = {**found, **own.get("sets", {})}
            write_evaluation(folder, sets, calibrated=own.get("calibrated"), dataset=own.get("dataset"))

    def calibrate(self, dataset: Any, *, method: str | None = None) -> Any:
        """Fits a calibration on validation rows and writes it beside the saved model, for `from_pretrained`.

        Args:
            dataset (`datasets.Dataset`): labelled rows that were not trained on, as [`hf_moecal.predict`] takes them.
            method (`str`, *optional*): as in `moecal calibrate`; `args.calibration_method` if unset.

        Returns:
            [`~hf_moecal.calibration.selection.CalibrationResult`]: what was chosen, with figures on held-out rows
            before and after; `None` on all processes but the main one.

        Raises:
            ValueError: the rows were trained on, or the task or a sharded model cannot be calibrated here.

        Example:

        ```python
        trainer.train()
        print(trainer.calibrate(data["validation"]).after["ece"])
        ```
        """
        from .calibrating import calibrate_trained

        return calibrate_trained(self, dataset, method=method)

    def push_to_hub(self, commit_message: str = "Publish the model with its calibration", **kwargs: Any) -> str | None:
        """Publishes the model with its calibration and a card that states it; see [`hf_moecal.hub.push`].

        Args:
            commit_message (`str`): of the one commit.
            kwargs: `revision` and `token`, and what `Trainer.create_model_card` takes.

        Returns:
            `str`: address of the repository, on the main process.
        """
        from ..hub import push

        revision, token = kwargs.pop("revision", None), kwargs.pop("token", None) or self.args.hub_token
        kwargs.pop("blocking", None)  # one commit is over when the call is
        self.save_model(_internal_call=True)  # which otherwise publishes, and so comes back here
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self.save_training_record()
        self.save_evaluation()
        return push(
            self.args.output_dir,
            repo_id=self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
            private=self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            token=token,
            commit_message=commit_message,
            license=kwargs.get("license"),
        )

    def save_training_record(self) -> None:
        """Writes beside the weights how they were trained, and hashes of the training rows' text ids.

        [`hf_moecal.hub.calibrate`] then refuses to fit a calibration on rows that the model has seen.
        """
        if self.is_world_process_zero():
            write_training_record(self.args.output_dir, settings=self._settings(), ids=self._training_ids())

    def _settings(self) -> dict[str, Any]:
        names = ("method", "objective", "eta", "detach_weights", "robust_warmup_ratio", "train", "seed")
        names += ("num_train_epochs",)
        if self.args.readout != "native" or self.args.readout_members > 1:
            names += ("readout", "readout_experts", "readout_members", "expert_loss_weight")
        base = getattr(self.model.config, "_name_or_path", None)  # of a local path only the last part is written
        return {name: getattr(self.args, name) for name in names} | ({"base_model": base} if base else {})

    def _training_ids(self) -> list[str]:
        if "id" not in (getattr(self.train_dataset, "column_names", None) or ()):
            return []
        return [key for key in self.train_dataset["id"] if isinstance(key, str)]
