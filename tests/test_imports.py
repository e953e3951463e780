"""The import rule of docs/architecture.md, read from the sources: a module imports its own package or a lower row."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "puna"
ROWS = [
    {"artifacts", "config", "chat", "errors", "log", ""},
    {"kernels"},
    {"tokenizer"},
    {"model", "curation", "tools", "safety", "evaluation"},
    {"parallel", "quant"},
    {"planner", "scaling"},  # the planner computes with the layout that the trainer runs
    {"train", "inference"},
    {"posttrain", "serve"},
    {"recipes"},
    {"cli"},
]
ROW = {unit: number for number, row in enumerate(ROWS) for unit in row}


def unit_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported_units(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {unit_of(a.name) for a in node.names if a.name.split(".")[0] == "puna"}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "puna":
            names = [f"puna.{a.name}" for a in node.names] if node.module == "puna" else [node.module]
            found |= {unit_of(name) for name in names if unit_of(name) in ROW}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the row"
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_module_imports_its_own_package_or_a_lower_row(path):
    relative = path.relative_to(PACKAGE)
    unit = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    unit = "" if unit == "__init__" else unit
    assert unit in ROW, f"{unit} is not in the rows: add it here and to docs/architecture.md"
    # Row 0 is flat files that form one unit; elsewhere a package may import only itself within its row.
    wrong = {i for i in imported_units(path) if i != unit and ROW[i] >= ROW[unit] and not ROW[i] == ROW[unit] == 0}
    assert not wrong, f"{relative} (row {ROW[unit]}) imports {', '.join(sorted(wrong))}"


def test_the_rule_notices_an_import_that_goes_up(tmp_path):
    source = tmp_path / "bad.py"
    source.write_text("from puna.serve.http import serve\nimport puna.cli\nfrom puna import artifacts, train\n")
    assert imported_units(source) == {"serve", "cli", "artifacts", "train"}


def test_help_needs_neither_torch_nor_an_extra():
    import subprocess
    import sys

    script = "import sys; from puna.cli import parser; parser().format_help(); print([m for m in ('torch', 'pyarrow', 'fastapi') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
