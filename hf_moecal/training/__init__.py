"""The Trainer: its arguments, how a batch is judged, the optimizer batch, checkpoints, distillation."""
