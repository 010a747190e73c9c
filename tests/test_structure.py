"""Promises about the shape of the project."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {"codec": set(), "eval": {"codec"}, "train": {"codec", "eval"}, "scripts": {"codec", "eval", "train"}}


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module).split(".")[0])
    return found


def test_imports_point_one_way() -> None:
    seen = 0
    for package, allowed in MAY_IMPORT.items():
        for path in (ROOT / package).rglob("*.py"):
            ours = imported_packages(path) & {*MAY_IMPORT, "tests"}
            assert ours <= allowed | {package}, f"{path} imports {ours - allowed - {package}}"
            seen += bool(ours)
    assert seen > 20  # the test looks at something


def test_the_installed_commands_answer_quickly_and_without_torch() -> None:
    script = (
        "import sys, importlib\n"
        "for name in ('codec', 'train', 'eval'):\n"
        "    assert importlib.import_module(name + '.cli').main(['--help']) == 0\n"
        "    assert importlib.import_module(name + '.cli').main(['--version']) == 0\n"
        "assert not {'torch', 'diffusers', 'lpips', 'torchvision', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [f"{name} 0." in done.stdout for name in ("codec", "codec-train", "codec-eval")] == [True] * 3
