"""Which folder may import which: data flows one way through the package, and importing it stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_moecal


PACKAGE = Path(hf_moecal.__file__).parent
# What each folder may import, beside itself and what stands on the ground floor.
GROUND = {"files", "labels", "objectives", "table", "versions"}
ALLOWED = {
    "files": set(),
    "labels": {"table"},
    "objectives": {"labels"},
    "table": {"files"},
    "versions": set(),
    "probes": set(),
    "metrics": set(),
    "model": {"probes"},
    "calibration": {"metrics"},
    "report": {"metrics"},
    "drift": {"metrics"},
    "readouts": {"probes", "model", "metrics", "calibration"},
    "tasks": {"probes", "model", "metrics"},
    "hub": {"probes", "model", "metrics", "calibration", "readouts"},
    "predictions": {"probes", "model", "metrics", "calibration", "readouts", "tasks", "hub"},
    "training": {"probes", "model", "metrics", "calibration", "readouts", "tasks", "hub", "predictions"},
}
ALLOWED["cli"] = {name for name in ALLOWED if name not in GROUND}


def folder_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file):
    """Line and folder of everything of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            here = ["hf_moecal", *file.relative_to(PACKAGE).parts[:-1]]
            base = here[: len(here) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hf_moecal."):
                    yield node.lineno, alias.name.split(".")[1]
            continue
        else:
            continue
        if base[0] == "hf_moecal":
            for name in base[1:2] or [alias.name for alias in node.names]:
                yield node.lineno, name


def wrong_imports(file):
    """One sentence for each import that points up or sideways."""
    own = folder_of(file)
    assert own in ALLOWED, f"{file.name} lies in {own}/, which is not among the folders here: say what it may import."
    allowed = ALLOWED[own] | {own} | (set() if own in GROUND else GROUND)
    for line, name in imports_of(file):
        if name in ALLOWED and name not in allowed:
            homes = [home for home in ALLOWED if home not in GROUND and {own, name} <= ALLOWED[home] | {home}]
            place = homes[0] if homes else "cli"
            yield (
                f"{file.relative_to(PACKAGE)}:{line} imports {name}/, which {own}/ may not: what needs both belongs "
                f"in {place}/ or above, or what is shared belongs further down."
            )


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in GROUND)


def test_imports_point_down():
    assert not [sentence for file in FILES for sentence in wrong_imports(file)]


def test_an_import_upwards_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    file = tmp_path / "metrics" / "new.py"
    file.parent.mkdir()
    file.write_text("def f():\n    from ..training.trainer import MoECalTrainer\n    return MoECalTrainer\n")
    (sentence,) = wrong_imports(file)
    assert sentence.startswith("metrics/new.py:2 imports training/, which metrics/ may not")
    file.write_text("import hf_moecal.report\nfrom hf_moecal import table\nfrom .. import drift\n")
    assert [sentence.split()[2] for sentence in wrong_imports(file)] == ["report/,", "drift/,"]


def test_no_two_folders_import_each_other():
    pairs = {(folder_of(file), name) for file in FILES for _, name in imports_of(file) if name != folder_of(file)}
    assert not [pair for pair in pairs if pair[::-1] in pairs]


@pytest.mark.parametrize("name", ["evaluate", "datasets", "matplotlib", "peft", "torch", "transformers"])
def test_importing_the_package_is_light(name):
    code = f"import sys, hf_moecal; sys.exit({name!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_type_checkers_see_the_public_names():
    """What stands under TYPE_CHECKING is what is resolved when the package runs, name by name."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == hf_moecal._MODULE_OF
    assert all(alias.asname == alias.name for node in block.body for alias in node.names)  # re-exported
