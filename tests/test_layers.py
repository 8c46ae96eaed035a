"""Imports only go down: the house plan of docs/design.md, read off the import statements."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "rljax"

LEVELS = [
    {"errors", "extras"},
    {"failures"},
    {"__init__", "types", "ranges", "comments"},
    {"ops"},
    {"losses"},
    {"advantages", "shaping", "filters", "sharding", "metrics", "distributed", "traces"},
    {"hosts", "stops"},
    {"models"},
    {"train", "logprobs", "data", "decoding"},
    {"views", "identity"},
    {"objectives", "sampling"},
    {"policy"},
    {"reference", "checkpoint", "finite", "progress", "manifest", "plots", "silence"},
    {"kept"},
    {"artefacts", "groups", "notes"},
    {"tracking", "tasks", "rewards", "methods", "critics", "selfchecks"},
    {"environments"},
    {"report", "runs", "program", "iteration"},
    {"prompts", "papers", "options", "compilation", "allocator", "overlays", "resuming", "passes"},
    {"judges", "settings", "evidence", "compare"},
    {"episodes"},
    {"presets", "collect", "evaluation"},
    {"online_setup"},
    {"loop"},
    {"offline", "online"},
    {"plan"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# Who may import a library; the mathematics needs jax alone.
ONLY_IN = {
    "flax": {"models"},
    "optax": {"train", "program", "selfchecks", "iteration", "loop", "offline", "online", "online_setup"},
    "orbax": {"checkpoint"},
    "etils": {"checkpoint"},
    "transformers": {"models", "data"},
    "tyro": {"cli", "options"},
    "grain": {"data"},
    "matplotlib": {"plots", "report", "papers", "overlays", "compare"},
    "jinja2": {"compare"},
    "tensorboardX": {"tracking"},
    "wandb": {"tracking"},
    "sacrebleu": {"rewards"},
    "regex": {"rewards"},
    "rouge_score": {"rewards"},
    "vaderSentiment": {"rewards"},
}
MATHEMATICS = {"errors", "types", "ops", "losses", "advantages", "shaping"}
ALLOWED_IN_MATHEMATICS = {"jax", "jaxtyping", "chex", "rljax"}

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, dotted; `from rljax import ops` counts as rljax.ops."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "rljax" else {node.module}
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = room(path)
    assert here in LEVEL, f"{here} has no place in the house plan: give it a level here and in docs/design.md"
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top == "rljax":
            there = rest.split(".")[0] or "__init__"
            there = there if there in LEVEL else "__init__"
            assert there == here or LEVEL[there] < LEVEL[here], f"{here} imports {there}, which is not below it"
        elif top in ONLY_IN:
            assert here in ONLY_IN[top], f"{here} imports {top}"
        if here in MATHEMATICS:
            assert top in ALLOWED_IN_MATHEMATICS or top in sys.stdlib_module_names, f"{here} imports {top}"


def test_the_mathematics_needs_neither_flax_nor_transformers():
    code = (
        "import sys, rljax.losses, rljax.ops, rljax.advantages; "
        "bad = {'flax', 'transformers', 'optax', 'orbax', 'tyro', 'grain'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=PACKAGE.parent)


def test_files_and_functions_stay_small():
    for path in FILES:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        assert len(lines) <= 400, f"{path} has {len(lines)} lines: split it"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.name}:{node.name} has {length} lines: split it"
