"""Imports point one way: the map of the README, read from the code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each part may import of this project, by prefix. Deeper parts come first.
ALLOWED = {
    "lit_ft/errors.py": (),
    "lit_ft/distributed/processes.py": ("lit_ft.errors",),
    "lit_ft/progress.py": ("lit_ft.distributed.processes",),
    "lit_ft/batches.py": (),
    "lit_ft/losses": ("lit_ft.losses",),
    "lit_ft/adapter.py": ("lit_ft.errors",),
    "lit_ft/resources/machine.py": ("lit_ft.errors",),
    "lit_ft/resources/energy.py": (),
    "lit_ft/resources/allocator.py": (),
    "lit_ft/resources/flops.py": ("lit_ft.batches", "lit_ft.models.adapt"),
    "lit_ft/resources/memory.py": ("lit_ft.batches", "lit_ft.losses", "lit_ft.models"),
    "lit_ft/resources/estimate.py": ("lit_ft.batches", "lit_ft.losses", "lit_ft.models", "lit_ft.rollouts"),
    "lit_ft/previewing/page.py": (),
    "lit_ft/data": ("lit_ft.data", "lit_ft.batches", "lit_ft.adapter", "lit_ft.errors", "lit_ft.progress"),
    "lit_ft/models": (
        "lit_ft.models",
        "lit_ft.batches",
        "lit_ft.losses",
        "lit_ft.adapter",
        "lit_ft.errors",
        "lit_ft.resources.machine",
        "lit_ft.progress",
    ),
    # Its wiring is compare.py alone; the sections ask a Subject and know no files.
    "lit_ft/evaluation": (
        "lit_ft.evaluation",
        "lit_ft.adapter",
        "lit_ft.batches",
        "lit_ft.data",
        "lit_ft.errors",
        "lit_ft.exporting",
        "lit_ft.losses",
        "lit_ft.models",
        "lit_ft.previewing.page",
        "lit_ft.progress",
        "lit_ft.reference",
        "lit_ft.rollouts",
    ),
    "lit_ft/evaluate.py": (
        "lit_ft.adapter",
        "lit_ft.cli",
        "lit_ft.errors",
        "lit_ft.evaluation",
        "lit_ft.exporting",
        "lit_ft.progress",
    ),
    "lit_ft/exporting": (
        "lit_ft.exporting",
        "lit_ft.models",
        "lit_ft.adapter",
        "lit_ft.errors",
        "lit_ft.progress",
    ),
    "lit_ft/export.py": ("lit_ft.cli", "lit_ft.errors", "lit_ft.exporting"),
    "lit_ft/reference.py": (
        "lit_ft.batches",
        "lit_ft.data.packing",
        "lit_ft.distributed.processes",
        "lit_ft.models",
        "lit_ft.progress",
    ),
    "lit_ft/judging.py": ("lit_ft.batches", "lit_ft.data.packing", "lit_ft.models", "lit_ft.progress"),
    "lit_ft/rewards": (
        "lit_ft.rewards",
        "lit_ft.judging",
        "lit_ft.models",
        "lit_ft.batches",
        "lit_ft.data.formats",
        "lit_ft.data.packing",
        "lit_ft.errors",
    ),
    # The one place where training speaks to the server's engine.
    "lit_ft/rollouts/vllm.py": ("lit_ft.rollouts.base", "lit_ft.errors", "lit_ft.progress", "serve.engine"),
    "lit_ft/rollouts/base.py": ("lit_ft.errors",),
    "lit_ft/rollouts/transformers.py": ("lit_ft.rollouts.base", "lit_ft.models", "lit_ft.errors"),
    "lit_ft/rollouts/shared.py": ("lit_ft.rollouts.base", "lit_ft.distributed.processes"),
    "lit_ft/rollouts/__init__.py": ("lit_ft.rollouts",),
    "lit_ft/modules": (
        "lit_ft.modules",
        "lit_ft.models",
        "lit_ft.losses",
        "lit_ft.rewards.base",
        "lit_ft.rollouts.base",
        "lit_ft.batches",
        "lit_ft.data.packing",
        "lit_ft.distributed.processes",
        "lit_ft.errors",
        "lit_ft.progress",
    ),
    # The parts of a run: `train` puts them together, and a preview looks at them; they know neither.
    "lit_ft/wiring": (
        "lit_ft.wiring",
        "lit_ft.adapter",
        "lit_ft.batches",
        "lit_ft.callbacks",
        "lit_ft.checkpoint",
        "lit_ft.config",
        "lit_ft.data",
        "lit_ft.distributed",
        "lit_ft.errors",
        "lit_ft.judging",
        "lit_ft.losses",
        "lit_ft.models",
        "lit_ft.modules",
        "lit_ft.progress",
        "lit_ft.reference",
        "lit_ft.replay",
        "lit_ft.resources",
        "lit_ft.rewards",
        "lit_ft.rollouts",
    ),
    "lit_ft/previewing": (
        "lit_ft.previewing",
        "lit_ft.wiring",
        "lit_ft.adapter",
        "lit_ft.batches",
        "lit_ft.checkpoint",
        "lit_ft.config",
        "lit_ft.data",
        "lit_ft.distributed.processes",
        "lit_ft.errors",
        "lit_ft.models",
        "lit_ft.replay",
        "lit_ft.resources",
        "lit_ft.rewards.base",
        # What can be said of vLLM before it is started.
        "serve.engine",
    ),
    "lit_ft/replay.py": ("lit_ft.batches", "lit_ft.models", "lit_ft.progress", "lit_ft.reference", "lit_ft.rollouts"),
    "lit_ft/callbacks": (
        "lit_ft.models.kinds",
        "lit_ft.adapter",
        "lit_ft.resources.energy",
        "lit_ft.resources.memory",
        "lit_ft.progress",
        "lit_ft.batches",
        "lit_ft.distributed.processes",
        "lit_ft.resources.flops",
        "lit_ft.distributed.launched",
        "lit_ft.losses",
        "lit_ft.resources.machine",
    ),
    "lit_ft/checkpoint.py": ("lit_ft.errors", "lit_ft.progress"),
    "lit_ft/distributed/strategy.py": ("lit_ft.distributed.processes", "lit_ft.models"),
    "lit_ft/distributed/launched.py": ("lit_ft.distributed.processes",),
    "lit_ft/distributed/launch.py": (
        "lit_ft.adapter",
        "lit_ft.distributed.launched",
        "lit_ft.progress",
        "lit_ft.sweep",
    ),
    "lit_ft/config.py": (),
    "lit_ft/sweep.py": ("lit_ft.adapter", "lit_ft.errors", "lit_ft.progress"),
    # The preference store and its statistics stand alone; what serves stands below what shows.
    "serve/ranking.py": (),
    "serve/votes.py": ("lit_ft.errors", "serve.ranking"),
    "serve/limits.py": ("lit_ft.errors",),
    "serve/metrics.py": (),
    "serve/accounts.py": ("lit_ft.errors",),
    "serve/access.py": ("lit_ft.errors", "serve.accounts", "serve.limits"),
    "serve/client.py": ("lit_ft.errors", "serve.errors"),
    "serve/fleet.py": (
        "lit_ft.adapter",
        "lit_ft.errors",
        "serve.choices",
        "serve.errors",
        "serve.metrics",
        "serve.registry",
    ),
    "serve/gateway.py": (
        "lit_ft.errors",
        "serve.client",
        "serve.errors",
        "serve.fleet",
        "serve.limits",
        "serve.metrics",
    ),
    "serve/api.py": ("lit_ft.adapter", "lit_ft.errors", "serve.cards", "serve.fleet", "serve.limits"),
    "serve/watcher.py": (
        "lit_ft.adapter",
        "lit_ft.errors",
        "serve.canary",
        "serve.errors",
        "serve.fleet",
        "serve.registry",
        "serve.weights",
    ),
    "serve/pages": (
        "lit_ft.adapter",
        "lit_ft.errors",
        "serve.base",
        "serve.cards",
        "serve.client",
        "serve.conversation",
        "serve.errors",
        "serve.fleet",
        "serve.gateway",
        "serve.metrics",
        "serve.pace",
        "serve.pages",
        "serve.ranking",
        "serve.stopping",
        "serve.votes",
    ),
    "serve": ("serve", "lit_ft.adapter", "lit_ft.errors", "lit_ft.cli", "lit_ft.models.resolve"),
}


# Who knows Hydra: the command line, what starts its runs anew in other processes, and what instantiates.
HYDRA = {
    "cli.py",
    "config.py",
    "distributed/launch.py",
    "preview.py",
    "previewing/settings.py",
    "sweep.py",
    "train.py",
    "wiring/trainer.py",
}


def project_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            # `from lit_ft import adapter` imports lit_ft.adapter.
            whole = node.module in ("lit_ft", "serve")
            found |= {f"{node.module}.{name.name}" if whole else node.module for name in node.names}
    return {name for name in found if name.split(".")[0] in {"lit_ft", "serve"}}


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_lies_below_it(part: str) -> None:
    path = ROOT / part
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert files
    for file in files:
        for name in project_imports(file):
            assert name.startswith(ALLOWED[part]) and ALLOWED[part], f"{file.relative_to(ROOT)} imports {name}"


def test_only_the_command_line_and_the_wiring_know_hydra() -> None:
    for file in sorted((ROOT / "lit_ft").rglob("*.py")) + sorted((ROOT / "serve").rglob("*.py")):
        if "hydra" in file.read_text(encoding="utf-8"):
            assert str(file.relative_to(ROOT / "lit_ft")) in HYDRA, f"{file.relative_to(ROOT)} speaks of Hydra"


def test_only_commands_and_the_wiring_know_the_settings() -> None:
    above = ("cli.py", "preview.py", "train.py", "wiring/", "previewing/")
    for file in sorted((ROOT / "lit_ft").rglob("*.py")) + sorted((ROOT / "serve").rglob("*.py")):
        if "lit_ft.config" in project_imports(file):
            assert str(file.relative_to(ROOT / "lit_ft")).startswith(above), f"{file.relative_to(ROOT)} knows them"


def test_losses_import_torch_only() -> None:
    for file in sorted((ROOT / "lit_ft" / "losses").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        names |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        outside = {n.split(".")[0] for n in names} - {"torch", "typing", "collections", "__future__", "lit_ft"}
        assert not outside, f"{file.name} imports {outside}"


def test_every_file_says_what_it_holds() -> None:
    for file in [*(ROOT / "lit_ft").rglob("*.py"), *(ROOT / "serve").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        text = file.read_text(encoding="utf-8")
        assert not text or text.startswith(('"""', 'r"""')), f"{file.relative_to(ROOT)} has no first line"
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert file.read_text(encoding="utf-8").startswith("#"), f"{file.relative_to(ROOT)} has no first line"
