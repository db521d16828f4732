"""Publish a checkpoint with its calibration on the Hub: one commit, checked after it was made."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.record import FILE_NAME, read_json, read_record, write_text
from ..model.loading import ADAPTER_CONFIG
from ..model.weight_files import INDEX, MEMBERS_FILE, WHOLE, weight_files
from ..readouts.mixture import Readout
from ..readouts.recorded import check_fresh
from ..versions import http_errors
from .checkpoint_card import CARD, license_of_base, make_card, published_card
from .checkpoint_files import EVALUATION_FILE, TRAINING_FILE, fresh_evaluation, write_evaluation
from .model_card import benchmark_entry


if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PUBLISHED = (
    *("config.json", "generation_config.json", "*.safetensors.index.json"),
    *(ADAPTER_CONFIG, "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "chat_template*", "additional_chat_templates/*"),
    *("preprocessor_config.json", "processor_config.json"),
    *(FILE_NAME, TRAINING_FILE, EVALUATION_FILE, "LICENSE*", "NOTICE*"),
)
"""What goes to the Hub: a list of what may, not of what may not (`training_args.bin` is a pickle with the token)."""

_FIGURES = ("reliability*.png", "reliability*.svg", "figures/reliability*.png", "figures/reliability*.svg")
_SAFE_NAME = re.compile(r"[A-Za-z0-9._/-]+\Z")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_SCANNED_BYTES = 2**26  # a larger text is a vocabulary
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_TEXT_ENDINGS = {".json", ".md", ".txt", ".jinja", ".svg", ""}


class PublishError(RuntimeError):
    """The Hub could not be reached or refused; the message says in one sentence what to do."""


def push(
    model_dir: str | Path,
    *,
    repo_id: str,
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
    calibrated: Mapping[str, Mapping[str, Any]] | None = None,
    license: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Publish the model with its calibration",
) -> str:
    """Publishes a checkpoint with `calibration.json`, its diagrams and a model card that states its calibration.

    All files go up in one commit, so that the repository shows the old model or the new one, never a part. After it
    the repository is compared with the folder file by file. When anything fails, call `push` again: what is there
    already is not sent twice. The card is merged: text outside our section stays as it is on the Hub.

    What is written to the folder (the evaluation, the merged `README.md`) is written before the commit, each file
    whole or not at all; nothing is written after it.

    Args:
        model_dir: folder with the weights (safetensors) or a LoRA adapter, and whatever `write_calibration`,
            `write_training_record`, `write_evaluation` and `write_report` put there.
        repo_id: `"organisation/name"`; made if it does not exist.
        evaluation: figures per evaluation set of the checkpoint's own probabilities, and `calibrated` those after
            the calibration that it carries; written to the folder first (see
            [`~hf_moecal.hub.checkpoint_files.write_evaluation`]).
        license: the model's, as the Hub names them (`"apache-2.0"`). Default: what the folder's README.md or the
            published card names, else what the base model's card does.
        private: visibility of a new repository.
        revision: branch; made if it does not exist. Default: main.
        token: access token. Default: the one of `hf auth login` or `HF_TOKEN`.
        commit_message: of the commit.

    Returns:
        The address of the published commit.

    Raises:
        ValueError: the folder holds no publishable checkpoint, its calibration or evaluation is of other weights, or
            a file holds a token.
        PublishError: no token, a wrong one, or the Hub cannot be reached.
        OSError: the folder cannot be written to, or the disk is full; then nothing was published.
    """
    model_dir = Path(model_dir)
    if evaluation is not None:
        write_evaluation(model_dir, evaluation, calibrated=calibrated)
    elif calibrated is not None:
        raise ValueError("`calibrated` figures are set beside those before the calibration; give `evaluation` too.")
    files = publishable(model_dir)
    api = _api(token)
    for name, path in files.items():
        if path.suffix in _TEXT_ENDINGS and path.stat().st_size < _SCANNED_BYTES:
            _refuse_secrets(name, path.read_bytes(), api.token)
    with _explained("making the repository"):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    with _explained("reading the repository"):
        head = api.model_info(repo_id, revision=revision).sha
        published = published_card(api, repo_id, head)
    if license is None:
        with _explained("reading the base model's card"):
            license = license_of_base(api, model_dir)
    pictures = [name for name in files if name.endswith((".png", ".svg"))]
    card = make_card(model_dir, repo_id=repo_id, published=published, figures=pictures, license=license)
    made = {CARD: card.encode("utf-8"), **benchmark_entry(fresh_evaluation(model_dir))}
    for name, content in made.items():
        _refuse_secrets(name, content, api.token)
    _write_card(model_dir / CARD, card)  # before the commit, after which nothing is left to fail
    commit = _commit(api, repo_id, {**files, **made}, revision, head, commit_message)
    return f"{api.endpoint}/{repo_id}/commit/{commit}"


def _write_card(path: Path, card: str) -> None:
    try:
        write_text(path, card)
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}: README.md could not be written, and nothing was published", str(path)
        ) from error


def publishable(model_dir: Path) -> dict[str, Path]:
    """Files of a checkpoint folder that are published, by their path in the repository, after checking them.

    Raises:
        ValueError: no weights in safetensors, a missing shard, or a malformed calibration record.
    """
    if not model_dir.is_dir():
        raise ValueError(f"{str(model_dir)!r} is not a folder; give the folder of a saved checkpoint.")
    weights = {file.name: file for file in weight_files(model_dir)}
    missing = sorted(name for name, file in weights.items() if not file.is_file())
    if missing:
        raise ValueError(f"{INDEX} names {missing[0]!r}, which is not in the folder; save the checkpoint again.")
    found = {**_found(model_dir, (*_PUBLISHED, *_FIGURES)), **weights}
    has_config = "config.json" in found or ADAPTER_CONFIG in found
    if not has_config or not set(weights) - {MEMBERS_FILE}:
        raise ValueError(
            f"{str(model_dir)!r} has no checkpoint to publish: it needs config.json (or {ADAPTER_CONFIG}) and weights "
            "in safetensors; write it with save_pretrained. Pickled weights are not published."
        )
    members = 1
    if FILE_NAME in found:
        record = read_record(found[FILE_NAME])
        check_fresh(record, model_dir)
        readout = Readout.from_record(record.readout)
        members = readout.members
        if members > 1 and MEMBERS_FILE not in found:
            raise ValueError(f"{FILE_NAME} says {readout.name!r}, but {MEMBERS_FILE} is not in the folder.")
    if members == 1 and MEMBERS_FILE in found:
        raise ValueError(
            f"{MEMBERS_FILE} is of a committee, which {FILE_NAME} does not name; save that again, or delete the file."
        )
    if WHOLE in found:  # what transformers loads, so that an index is of shards that were here before
        found.pop(INDEX, None)
    if ADAPTER_CONFIG in found:
        base = read_json(found[ADAPTER_CONFIG]).get("base_model_name_or_path") or ""
        if Path(base).is_dir():
            warnings.warn(f"The adapter names the local folder {base!r} as its base model, which nobody else has.")
    return found


def _found(model_dir: Path, patterns: Iterable[str]) -> dict[str, Path]:
    paths = [path for pattern in patterns for path in sorted(model_dir.glob(pattern)) if path.is_file()]
    named = {path.relative_to(model_dir).as_posix(): path for path in paths}
    return {name: path for name, path in named.items() if _SAFE_NAME.match(name)}


def _api(token: str | None) -> HfApi:
    from huggingface_hub import HfApi, get_token

    token = token or get_token()
    if not token:
        raise PublishError("No access token for the Hub: run `hf auth login`, set HF_TOKEN, or pass token=.")
    return HfApi(token=token)


def _refuse_secrets(name: str, content: bytes, token: str) -> None:
    if token.encode() in content or _TOKEN.search(content):
        raise ValueError(f"{name} holds an access token and was not published; remove it from the file.")


def _commit(
    api: HfApi, repo_id: str, files: Mapping[str, Path | bytes], revision: str | None, head: str, message: str
) -> str:
    """Makes one commit on top of `head` and returns its id once the repository holds exactly these files."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, str(v) if isinstance(v, Path) else v) for name, v in files.items()]
    operations += _stale_weights(api, repo_id, head, files)
    try:
        with _explained("publishing"):
            # One commit, not upload_folder, which splits a large folder into several.
            api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head)
    except PublishError:
        # The answer may have been lost after the commit was made.
        if not _differing(api, repo_id, files, revision):
            return _head(api, repo_id, revision)
        raise
    with _explained("checking what was published", done="The commit was made."):
        wrong = _differing(api, repo_id, files, revision)
        if wrong:
            raise PublishError(f"The Hub holds another {wrong[0]} than this folder after the commit; push again.")
        return _head(api, repo_id, revision)


def _head(api: HfApi, repo_id: str, revision: str | None) -> str:
    return api.model_info(repo_id, revision=revision).sha


def _stale_weights(api: HfApi, repo_id: str, head: str, files: Mapping[str, Any]) -> list[Any]:
    """Deletions of an earlier model's weight files, which a reader would prefer or mix up with the new ones."""
    from huggingface_hub import CommitOperationDelete

    with _explained("reading the repository"):
        there = api.list_repo_files(repo_id, revision=head)
    weights = [
        name for name in there if name.endswith((".safetensors", ".safetensors.index.json")) and "/" not in name
    ]
    return [CommitOperationDelete(name) for name in weights if name not in files]


def _differing(api: HfApi, repo_id: str, files: Mapping[str, Path | bytes], revision: str | None) -> list[str]:
    """Names of the files that the repository does not hold as they are here."""
    try:
        found = {entry.path: entry for entry in api.get_paths_info(repo_id, list(files), revision=revision)}
    except Exception:  # unreachable: nothing can be said to be there
        return list(files)
    return [name for name, content in files.items() if not _is_same(found.get(name), content)]


def _is_same(entry: Any, content: Path | bytes) -> bool:
    if entry is None:
        return False
    size = content.stat().st_size if isinstance(content, Path) else len(content)
    if entry.size != size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == _digest(content, hashlib.sha256())
    return entry.blob_id == _digest(content, hashlib.sha1(b"blob %d\0" % size))


def _digest(content: Path | bytes, digest: Any) -> str:
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with open(content, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


@contextmanager
def _explained(step: str, done: str = "Nothing half-done is visible.") -> Iterator[None]:
    """Turns what can go wrong on the way to the Hub into one sentence that says what was done and what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except (PublishError, HFValidationError):
        raise
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reasons = {
            401: "the Hub does not accept the access token; run `hf auth login` or pass another one",
            403: "the access token may not write to this repository; make one with write permission",
            404: "there is no such repository, or the access token does not show it",
            409: "the repository is being changed by somebody else; push again",
            412: "the repository was changed meanwhile; push again, and that change is merged",
        }
        said = getattr(error, "server_message", None) or f"the Hub answered with status {status}"
        reason = reasons.get(status, f"{' '.join(said.split())[:200]}; push again later")
        # Not chained: a broken upload's own message holds the signed address that it went to.
        raise PublishError(f"Failed {step}: {reason}. {done}") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError):
            said = "the answer of the Hub was no JSON; push again later."
        else:  # the client's own words, such as what is wrong with the metadata of README.md
            said = " ".join(str(error).split())[:300]
        raise PublishError(f"Failed {step}: {said} {done}") from None
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError | http_errors()):
            raise
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise PublishError(
                f"Failed {step}: {error.strerror} ({error.filename}) on this machine; push again after that. {done}"
            ) from None
        raise PublishError(
            f"Failed {step}: the connection broke ({type(error).__name__}); push again. {done}"
        ) from None
