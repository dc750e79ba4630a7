"""The rules of docs/architecture.md that a machine can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "kvlink"

# Folder of csrc/kvlink -> the folders it may include. csrc/bindings may include all of them.
_DATA = {"base", "layout", "params"}
CXX_LAYERS = {
    "base": {"base"},
    "layout": {"base", "layout"},
    "params": _DATA,
    "cpu": _DATA | {"cpu"},
    "cuda": _DATA | {"cuda"},
    "transport": _DATA | {"transport"},
    "emulation": _DATA | {"cuda"},
}

# Module (or package) of kvlink -> those it may import; itself, `errors` and `_arguments` go without
# saying.
_LAYOUT = {"_planes", "_serialise", "_shard", "layout"}
_POOL = _LAYOUT | {"_tensor_axes", "pool", "_C"}
_OPERATORS = _POOL | {"_arrays", "_cuda_part", "backends", "reference"}
PYTHON_LAYERS = {
    "errors": set(),
    "_arguments": set(),
    "_memory": set(),
    "_planes": set(),
    "_serialise": {"_planes"},
    "_shard": {"_planes"},
    "layout": _LAYOUT | {"_tensor_axes"},  # the latter when from_tensor is called
    "_tensor_axes": _LAYOUT | {"_C"},
    "pool": _POOL,
    "pages": set(),
    "cuda_array": {"_cuda_part"},
    "_arrays": _LAYOUT,
    "_cuda_part": {"_cuda"},
    "_readiness": {"_C"},
    "backends": set(),
    "rope": {"_C", "_planes", "_arrays", "_cuda_part", "backends", "reference", "triton"},
    "_layer_pairs": {"_shard"},
    "_moving": _POOL | {"_cuda_part", "backends"},  # and, by name, the backend that is chosen
    "cache_ops": _OPERATORS | {"_layer_pairs", "_moving", "rope", "triton"},
    "attention_plan": _POOL | {"_arrays", "_cuda_part"},
    "attention_merge": {"_C", "_arrays", "_cuda_part", "backends", "reference", "triton"},
    "_attention_choice": _POOL | {"backends"},
    "attention": _OPERATORS
    | {"_attention_choice", "_readiness", "triton"},  # reference and triton when they are chosen
    "reference": _LAYOUT,
    "triton": {"_planes", "_shard", "_layer_pairs"},  # usable without anything compiled
    "transfer": _POOL | {"pages", "cache_ops"},
    "doctor": {"_C", "_cuda", "_memory", "transfer", "doctor_peer"},
    "doctor_peer": {"transfer"},
}
SEE_EVERYTHING = {"__init__", "cli", "serving", "integrations", "testing"}
SEEN_BY_NOBODY = {"cli", "serving", "integrations", "testing"}

SOURCES = sorted(
    path for path in CSRC.rglob("*") if path.suffix in (".cpp", ".hpp", ".cu", ".cuh", ".inl")
)
MODULES = sorted(PACKAGE.rglob("*.py"))
TEXTS = sorted(
    path
    for pattern in ("csrc/**/*", "kvlink/**/*.py", "docs/**/*", "benchmarks/**/*", "examples/**/*")
    for path in ROOT.glob(pattern)
    if path.suffix in (".cpp", ".hpp", ".cu", ".cuh", ".py", ".md")
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(source: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+[<"]([^>"]+)[>"]', source.read_text(), re.MULTILINE)


def layer_of(source: Path) -> str:
    parts = source.relative_to(CSRC).parts
    return parts[1] if parts[0] == "kvlink" else parts[0]


def imports(module: Path) -> set[str]:
    """First names below kvlink that a module imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name(module)}: a relative import"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {each.split(".")[1] for each in dotted if each.startswith("kvlink.")}
    return found


def unit_of(module: Path) -> str:
    parts = module.relative_to(PACKAGE).parts
    return parts[0].removesuffix(".py")


def test_there_is_something_to_check() -> None:
    assert {layer_of(source) for source in SOURCES} >= {"base", "layout", "cpu", "bindings"}
    assert len(MODULES) > 10


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_cxx_layers(source: Path) -> None:
    layer = layer_of(source)
    for header in includes(source):
        if layer != "bindings":
            assert not re.match(r"pybind11|Python\.h|dlpack", header), header
        assert not re.match(r"torch|ATen|c10", header), header
        if re.match(r"cuda|cooperative_groups|cub/|cute/|cutlass", header):
            assert layer in ("cuda", "bindings", "emulation"), header
        target = header.split("/")
        assert target[0] != "emulation" or layer == "emulation", f"{layer} includes {header}"
        if target[0] == "kvlink" and layer in CXX_LAYERS:
            assert target[1] in CXX_LAYERS[layer], f"{layer} includes {header}"
        assert not header.startswith(".."), header


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_python_layers(module: Path) -> None:
    unit, found = unit_of(module), imports(module)
    known = set(PYTHON_LAYERS) | SEE_EVERYTHING
    assert unit in known, f"give {unit} a place among the layers"
    if unit in SEE_EVERYTHING:
        return
    found &= known | {"_C", "_cuda"}  # what remains are names of kvlink/__init__.py
    allowed = PYTHON_LAYERS[unit] | {unit, "errors", "_arguments"}
    assert found <= allowed, f"{unit} imports {sorted(found - allowed)}"
    assert not found & SEEN_BY_NOBODY


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_library_modules_import_no_torch_at_the_top(module: Path) -> None:
    if unit_of(module) in ("reference", "serving", "integrations", "testing", "triton"):
        return
    tree = ast.parse(module.read_text())
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    assert not {each.split(".")[0] for each in named} & {"torch", "cupy", "triton"}


@pytest.mark.parametrize("module", MODULES, ids=name)
def test_no_pickle(module: Path) -> None:
    assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve)\b", module.read_text(), re.M)


@pytest.mark.parametrize("path", [*SOURCES, *MODULES], ids=name)
def test_file_lengths(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= (300 if path.suffix == ".py" else 500)


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_nothing_ends_the_process(source: Path) -> None:
    code = re.sub(r"//.*", "", source.read_text())
    assert not re.search(r"\b(abort|_?exit|quick_exit|terminate)\s*\(", code)


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_vector_sources_keep_to_their_namespace(source: Path) -> None:
    """They are compiled once per SIMD level, so nothing in them may be shared between levels."""
    if not source.stem.endswith("_simd"):
        return
    assert re.search(r"^namespace kvlink::cpu::KVLINK_SIMD_LEVEL\b", source.read_text(), re.M)
    containers = {"vector", "string", "map", "algorithm", "functional", "memory", "sstream"}
    assert not containers & set(includes(source))


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_words(path: Path) -> None:
    """One name a thing: a page is no block. And no loose ends."""
    text = path.read_text()
    assert not re.search(r"\b(block_tables?|block_size|num_blocks|kv_blocks?)\b", text)
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
