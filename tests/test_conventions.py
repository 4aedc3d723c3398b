"""Conventions of this project that no linter checks."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dino.config import schema
from dino.config.load import settings

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(ROOT.glob("dino/**/*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

# Packages that are needed for slides, reports, curves and labels, but not for training.
LAZY = [
    "hs2p",
    "openslide",
    "shapely",
    "cv2",
    "matplotlib",
    "tensorboard",
    "h5py",
    "sklearn",
    "jinja2",
    "wandb",
    "mlflow",
    "pyarrow",
    "tifffile",
]


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_only_one_module_imports_torch_distributed():
    importers = {
        _name(path)
        for path in MODULES
        for name in _imports(_tree(path))
        if name.startswith(("torch.distributed", "torch.nn.parallel"))
    }
    assert importers == {"dino/distributed.py"}


def test_training_imports_without_optional_packages():
    program = "\n".join(
        [
            "import sys",
            *(f"sys.modules[{name!r}] = None" for name in LAZY),
            "import dino, dino.api.pretraining",
            "from dino.api import export, extract, info, load_backbone, pretrain",
        ]
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_module_is_named_like_a_standard_library_module():
    """`python3 dino/patch.py` would otherwise import it instead of the real one."""
    assert not {path.stem for path in (ROOT / "dino").iterdir()} & set(sys.stdlib_module_names) - {"__init__"}


def test_files_are_written_by_one_module():
    """Files are written atomically, so only dino.files writes text or bytes."""
    found = [
        f"{_name(path)}:{call.lineno} {name}"
        for path in MODULES
        if _name(path) not in ("dino/files.py", "dino/slides/storage.py")  # storage: a whole folder, then one rename
        for name, call in _calls(_tree(path))
        if re.search(r"\.write_(text|bytes)$", name) and not name.startswith("files.")
    ]
    assert found == []


def test_nothing_unpickles_code():
    found = []
    for path in MODULES:
        tree = _tree(path)
        for name, call in _calls(tree):
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
            if (name == "torch.load" and not safe) or re.match(r"(pickle|dill|joblib)\.", name):
                found.append(f"{_name(path)}:{call.lineno} {name}")
    assert found == []


def test_randomness_comes_from_draw_numbers():
    """No global random generator is used, neither NumPy's nor Python's."""
    found = [
        f"{_name(path)}:{call.lineno} {name}"
        for path in MODULES
        if path.name != "randomness.py"
        for name, call in _calls(_tree(path))
        if re.match(r"(np|numpy)\.random\.|random\.(random|choice|shuffle|randint|seed|sample)$", name)
    ]
    assert found == []


def _internal_imports(tree: ast.AST) -> set[str]:
    """Modules of this package that a module imports, at any depth."""
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in MODULES}
    found = set()
    for name in _imports(tree):
        if name.startswith("dino."):
            found |= {name, name.rpartition(".")[0]} & names
    return found


def test_modules_and_functions_stay_small():
    """The limits of CONTRIBUTING.md."""
    found = []
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if len(text.splitlines()) > 500:
            found.append(f"{_name(path)}: {len(text.splitlines())} lines")
        tree = ast.parse(text)
        if len(_internal_imports(tree)) > 12 and path.name != "__init__.py":  # an index names all modules
            found.append(f"{_name(path)}: {len(_internal_imports(tree))} internal imports")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) else None
                lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
                lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0  # type: ignore[operator]
                if lines > 60:
                    found.append(f"{_name(path)}: {node.name} has {lines} lines")
    assert found == []


def test_only_the_level_objects_depend_on_the_level():
    """What differs between tiles and grids is in api/levels.py and models/inputs.py, not in branches elsewhere."""
    branch = re.compile(
        r"""(==|!=|\bin\b)\s*[\(\{\[]?\s*["'](patch|region|slide)["']|isinstance\([^)]*(PatchConfig|RegionConfig)"""
    )
    found = [
        f"{_name(path)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if branch.search(line)
    ]
    assert len(found) <= 3, found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'(?:src|href)="([^"#]+)"', text)
    local = [link for link in links if not link.startswith(("http:", "https:", "mailto:"))]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_tests_named_on_the_page_of_guarantees_exist():
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    tests = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py")}
    named = re.findall(r"`[^`]*?(test_\w+\.py)(?:::(\w+))?", text)
    assert len(named) > 30
    assert [f"{file}::{test}" for file, test in named if f"def {test}" not in tests.get(file, "")] == []
    paths = re.findall(r"`(tests/[\w/.]+)", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_code_blocks_exist(page):
    kinds = [value for name, value in vars(schema).items() if name.endswith("Config") and isinstance(value, type)]
    keys = {item.key for kind in kinds for item in settings(kind)} | {"model", "data_dir", "output_dir"}
    code = "\n".join(re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    commands = [line for line in code.replace("\\\n", " ").splitlines() if re.search(r"\bdino\b", line)]
    used = [key for line in commands for key in re.findall(r"(?<=\s)([a-z_][\w.]*)=", line)]
    assert [key for key in used if key not in keys] == []
