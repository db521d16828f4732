"""What an `accelerate launch` configuration says about processes, sharding and precision."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Launch:
    """How a training is spread over devices.

    Attributes:
        processes (`int`): devices, one process each.
        sharding (`str`): `"none"`, `"ddp"`, `"fsdp2"`, `"zero0"`, `"zero1"`, `"zero2"` or `"zero3"`.
        precision (`str`): mixed precision: `"no"`, `"bf16"` or `"fp16"`.
        reshard (`bool`): whether FSDP2 frees each layer after its forward.
        checkpointing (`bool`): whether FSDP2 checkpoints the activations of each layer.
    """

    processes: int = 1
    sharding: str = "none"
    precision: str = "no"
    reshard: bool = True
    checkpointing: bool = False

    def __str__(self) -> str:
        names = {"none": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
        kind = names.get(self.sharding) or f"ZeRO-{self.sharding[-1]}"
        return f"{kind}, {self.processes} device{'s' if self.processes > 1 else ''}, mixed precision {self.precision}"


def read_launch(path: str | Path) -> Launch:
    """Reads a configuration as `accelerate launch --config_file` does, and checks what that leaves unchecked.

    Args:
        path (`str` or `Path`): a YAML or JSON file, as written by `accelerate config`.

    Raises:
        ValueError: the file is absent, a key in it does not exist (accelerate ignores unknown keys of `fsdp_config`
            and `deepspeed_config`), or it asks for FSDP 1, offloading, or another way to distribute.

    Example:

    ```python
    >>> from hf_moecal.cli.plan import read_launch
    >>> str(read_launch("recipes/accelerate/fsdp2_full.yaml"))
    'FSDP2, 8 devices, mixed precision bf16'

    ```
    """
    from accelerate.commands.config.config_args import load_config_from_file

    if not Path(path).is_file():
        raise ValueError(f"No accelerate configuration at {str(path)!r}; recipes/accelerate has four.")
    config = load_config_from_file(str(path))
    kind = getattr(config.distributed_type, "value", config.distributed_type)
    _check_keys("fsdp_config", config.fsdp_config)
    _check_keys("deepspeed_config", config.deepspeed_config)
    known: dict[str, Any] = {"processes": config.num_processes, "precision": config.mixed_precision or "no"}
    if kind == "FSDP":
        return Launch(**known, **_fsdp(config.fsdp_config))
    if kind == "DEEPSPEED":
        return Launch(**known, **_deepspeed(config.deepspeed_config))
    if kind == "NO" or kind.startswith("MULTI_"):
        return Launch(**known, sharding="ddp" if config.num_processes > 1 else "none")
    raise ValueError(f"{path} has distributed_type {kind}; a plan knows NO, MULTI_GPU, FSDP and DEEPSPEED.")


def _check_keys(section: str, settings: Mapping[str, Any]) -> None:
    """Every key must be an argument of `accelerate launch`, which silently sets whatever stands there."""
    from accelerate.commands.launch import launch_command_parser

    known = {action.dest for action in launch_command_parser()._actions}
    for key in settings:
        name = key if section != "fsdp_config" or key.startswith("fsdp") else f"fsdp_{key}"
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"{section} has an unknown key {key!r}, which accelerate would ignore{hint}")


def _fsdp(settings: Mapping[str, Any]) -> dict[str, Any]:
    given = {key.removeprefix("fsdp_"): value for key, value in settings.items()}
    if int(given.get("version", 1)) != 2:
        raise ValueError("fsdp_config has no `fsdp_version: 2`; training is exact, and planned, under FSDP2 only.")
    if given.get("offload_params"):
        raise ValueError("A plan does not count offloading; remove `fsdp_offload_params` to plan without it.")
    return {
        "sharding": "fsdp2",
        "reshard": str(given.get("reshard_after_forward", True)).lower() == "true",
        "checkpointing": bool(given.get("activation_checkpointing", False)),
    }


def _deepspeed(settings: Mapping[str, Any]) -> dict[str, Any]:
    if "deepspeed_config_file" in settings:
        raise ValueError(
            "deepspeed_config names a `deepspeed_config_file`; a plan reads the keys of the accelerate file only, as "
            "in `zero_stage: 3`."
        )
    for key in ("offload_optimizer_device", "offload_param_device"):
        if settings.get(key, "none") != "none":
            raise ValueError(f"A plan does not count offloading; set `{key}: none` to plan without it.")
    return {"sharding": f"zero{int(settings.get('zero_stage', 2))}"}
