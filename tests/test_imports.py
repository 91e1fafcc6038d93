"""The rules for every module of nestling, read from its source: who imports whom, who writes, who unpickles."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "nestling"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

TAXONOMY = {"taxonomy", "tree", "tree_cells", "tree_check", "tree_files", "names", "audit"}
BASE = TAXONOMY | {"errors", "seeds", "files", "lock", "interrupt", "collective", "config", "cores"}
CORE = BASE | {"data", "models", "objectives"}
FITTED = CORE | {"engine", "methods.recipe", "evaluate"}

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seeds": set(),
    "files": {"errors"},
    "lock": {"errors", "files"},
    "arguments": {"errors"},
    "interrupt": {"errors"},
    "collective": {"errors"},
    "cores": set(),
    "config": {"errors", "files"},
    **dict.fromkeys(TAXONOMY, TAXONOMY | {"errors", "files"}),
    "data": BASE,
    "objectives": BASE | {"data"},
    "models": CORE,
    "methods": CORE,
    "engine": CORE | {"methods.recipe"},
    "evaluate": FITTED,
    "lint": BASE | {"data"},
    "functional": CORE | {"evaluate"},
    "report": FITTED,
    "bundle": FITTED | {"report"},
    "provenance": set(),
    "options": set(),
    "commands": FITTED | {"methods", "report", "bundle", "provenance", "reproduce", "lint"},
    "reproduce": FITTED | {"methods", "report", "bundle", "provenance", "commands"},
}
"""What each part of the package may import, beside itself: a name stands for the module and all below it."""

FOR_ANNOTATIONS: dict[str, set[str]] = {"objectives": {"models"}, "commands": {"options"}}
"""What a part may name, under ``if TYPE_CHECKING``, though it does not import it."""

WHEN_CALLED: dict[str, set[str]] = {
    "engine/run.py": {"bundle"},  # Run.save_pretrained
}
"""What a module may import inside a function, for a shorthand that reaches up."""

EVERYTHING = {"__init__", "__main__", "cli"}
"""The modules at the top, which import whatever they like and which nothing else imports."""

WRITERS = {"files.py", "lock.py"}
"""The modules that may write in whatever way (the lock its holder's name); all others go through nestling.files."""

ALLOWED_WRITES: dict[str, set[str]] = {}
"""Exceptions, module by module, each with its reason: the calls as ``writing_call`` names them."""


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / module).read_text(encoding="utf-8"), filename=module)


def part_of(dotted: str) -> str:
    """``data.loader`` belongs to ``data``, ``errors`` to itself, the package to ``__init__``."""
    return dotted.split(".")[0] or "__init__"


def dotted_name(module: str) -> str:
    """``data/loader.py`` is ``data.loader``; ``data/__init__.py`` is ``data``; the root is the empty name."""
    return module.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int, str]]:
    """(dotted name below nestling, line, kind) of every import of our own; for the kinds see ``walk``."""
    package = dotted_name(module).split(".") if module.endswith("__init__.py") else dotted_name(module).split(".")[:-1]
    for node, kind in walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["nestling", *package][: len(package) + 2 - node.level]
                base = ".".join([*above, *filter(None, [node.module])])
            given = [alias.name for alias in node.names if (base, alias.name) != ("nestling", "__version__")]
            names = [f"{base}.{name}" if is_module(f"{base}.{name}") else base for name in given]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "nestling":
                yield name.removeprefix("nestling").strip("."), node.lineno, kind


def walk(tree: ast.AST, kind: str = "at once") -> Iterator[tuple[ast.AST, str]]:
    """Every node and when it runs: at once, when called (in a function), or for annotations (``if TYPE_CHECKING``)."""
    for child in ast.iter_child_nodes(tree):
        inside = kind
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            inside = "for annotations"
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = "when called"
        yield child, inside
        yield from walk(child, inside)


def is_module(dotted: str) -> bool:
    path = PACKAGE.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def permits(allowed: set[str], name: str) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    part = part_of(dotted_name(module))
    if part in EVERYTHING:
        return
    assert part in ALLOWED, f"{part} is new: say in ALLOWED what it may import"
    more = {"for annotations": FOR_ANNOTATIONS.get(part, set()), "when called": WHEN_CALLED.get(module, set())}
    for name, line, kind in imports(parse(module), module):
        allowed = ALLOWED[part] | {part} | more.get(kind, set())
        assert permits(allowed, name), f"{module}:{line} imports nestling.{name}: {part} may import {sorted(allowed)}"


def test_no_module_waits_for_itself() -> None:
    graph = {
        dotted_name(module): {name for name, _, kind in imports(parse(module), module) if kind == "at once"}
        - {dotted_name(module)}
        for module in MODULES
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {' → '.join(error.args[1])}")


def test_a_wrong_import_is_seen() -> None:
    tree = ast.parse(
        "from ..files import atomic_write\nfrom nestling import errors\nimport nestling.methods.nested as m\n"
        "if TYPE_CHECKING:\n    from .heads import Head\ndef f():\n    from nestling.data.loader import batches\n"
    )
    assert list(imports(tree, "models/model.py")) == [
        ("files", 1, "at once"),
        ("errors", 2, "at once"),
        ("methods.nested", 3, "at once"),
        ("models.heads", 5, "for annotations"),
        ("data.loader", 7, "when called"),
    ]
    assert not permits(ALLOWED["engine"], "methods.nested")
    assert not permits(ALLOWED["engine"], "methods")
    assert permits(ALLOWED["engine"], "methods.recipe")


# Writing -----------------------------------------------------------------------------------------------------------

OPENERS = {"open", "fdopen", "ZipFile", "TarFile", "memmap", "open_memmap"}
WRITING_MODE = re.compile(r"(?=.*[wax+])[rwaxbt+]{1,3}(:\w*)?")
WRITING_FUNCTIONS = {"os.replace", "os.link", "os.symlink", "os.truncate", "os.pwrite", "shutil.move", "shutil.copy"}
WRITING_METHODS = set(
    """
    write_text write_bytes touch rename renames symlink_to hardlink_to tofile save savetxt savez savez_compressed
    save_file savefig write_table write_dataset to_csv to_json to_parquet to_pickle to_feather
    copy2 copyfile copyfileobj copytree make_archive unpack_archive extractall urlretrieve FileHandler
    mkstemp mkdtemp NamedTemporaryFile TemporaryFile SpooledTemporaryFile TemporaryDirectory
    """.split()
)
"""Methods and functions whose name alone says that they write."""

INTO_A_BUFFER = {"save", "savefig", "to_csv", "to_json", "write_table"}
"""Methods that may also fill a buffer in memory, which they do when their first argument is one named so."""

BUFFERS = {"file", "buffer", "stream", "output"}

OTHERS_SAVE = re.compile(r"(torch|np|numpy|.*(image|picture|img|figure|fig|pil|fromarray\(.*\)))", re.IGNORECASE)
"""Whose ``save`` is not one of ours."""


def find_writes(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(call, line) of everything that puts bytes on the disk."""
    ours = {"files"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "nestling.files":
            ours.update(alias.asname or alias.name for alias in node.names)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            call = writing_call(node)
            if call and call.split(".")[0] not in ours:
                yield call, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module in {"torch", "numpy"}:
            for alias in node.names:
                if alias.name.startswith("save"):
                    yield f"{node.module}.{alias.name}", node.lineno


def writing_call(node: ast.Call) -> str | None:
    """How the call is named in a message, or None where it does not write."""
    name = ast.unparse(node.func)
    receiver, _, last = name.rpartition(".")
    modes = {value.value for value in [*node.args[:3], *(k.value for k in node.keywords)] if is_text(value)}
    if name == "os.open":
        return name if any(flag in ast.unparse(node) for flag in ("WRONLY", "RDWR", "CREAT", "APPEND")) else None
    if last in OPENERS:
        writing = sorted(mode for mode in modes if WRITING_MODE.fullmatch(mode))
        return f"{name}({writing[0]!r})" if writing else None
    if name == "os.write":
        return None if ast.unparse(node.args[0]) in {"1", "2"} else name
    if last == "save" and not OTHERS_SAVE.fullmatch(receiver):
        return None
    if name in WRITING_FUNCTIONS or (last in WRITING_METHODS and not fills_a_buffer(node, last)):
        return name
    return None


def fills_a_buffer(node: ast.Call, method: str) -> bool:
    return method in INTO_A_BUFFER and bool(node.args) and ast.unparse(node.args[0]).split(".")[-1] in BUFFERS


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("module", [module for module in MODULES if module not in WRITERS])
def test_files_are_written_through_nestling_files_alone(module: str) -> None:
    found = [(call, line) for call, line in find_writes(parse(module)) if call not in ALLOWED_WRITES.get(module, set())]
    assert not found, f"{module} writes by itself: {found}; use nestling.files.atomic_write, atomic_folder or Appender"


@pytest.mark.parametrize(
    "source",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('wb')",
        "io.open(path, 'x')",
        "gzip.open(path, 'wt')",
        "os.open(path, os.O_RDWR | os.O_CREAT)",
        "os.fdopen(descriptor, 'wb')",
        "os.replace(a, b)",
        "path.write_text(text)",
        "path.write_bytes(data)",
        "torch.save(state, path)",
        "np.save(path, array)",
        "np.savez_compressed(path, a=array)",
        "array.tofile(path)",
        "save_file(tensors, path)",
        "safetensors.torch.save_file(tensors, path)",
        "figure.savefig(path)",
        "image.save(path / 'a.png')",
        "Image.fromarray(array).save(path)",
        "self.picture.save(path)",
        "from elsewhere import write_text\nwrite_text(path, text)",
        "pq.write_table(table, path)",
        "zipfile.ZipFile(path, 'w')",
        "shutil.move(a, b)",
        "tempfile.NamedTemporaryFile()",
        "from torch import save",
        "logging.FileHandler(path)",
    ],
)
def test_a_write_is_seen(source: str) -> None:
    assert len(list(find_writes(ast.parse(source)))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "open(path)",
        "open(path, 'rb')",
        "path.open()",
        "path.open('rb')",
        "Image.open(file)",
        "image.save(buffer, format='PNG')",
        "figure.savefig(buffer, format='svg')",
        "files.atomic_write(path)",
        "text.replace('a', 'b')",
        "os.open(path, os.O_RDONLY)",
        "open(path, encoding='utf-8')",
        "zipfile.ZipFile(path)",
        "path.read_bytes()",
        "os.write(2, message)",
        "file.write(safetensors.torch.save(tensors))",
        "file.write(save(tensors))",
        "checkpoints.save(state)",
        "taxonomy.save(folder / 'taxonomy.json')",
        "from nestling.files import write_text\nwrite_text(path, text)",
        "files.write_text(path, text)",
    ],
)
def test_reading_is_no_write(source: str) -> None:
    assert not list(find_writes(ast.parse(source)))


# Loading -----------------------------------------------------------------------------------------------------------

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.package"}
UNSAFE_CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "yaml.load", "eval", "exec"}
UNSAFE_METHODS = {"read_pickle", "load_state_dict_from_url"}
UNSAFE_ARGUMENTS = {("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True)}


def find_unsafe_loads(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(what, line) of everything through which bytes from a file could become code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS or called.rpartition(".")[2] in UNSAFE_METHODS:
                yield called, node.lineno
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if (keyword.arg, value) in UNSAFE_ARGUMENTS:
                    yield f"{keyword.arg}={value}", node.lineno
            continue
        else:
            continue
        for name in names:
            if name in UNSAFE_MODULES | {"torch.load", "torch.hub"} or name.split(".")[0] in UNSAFE_MODULES:
                yield name, node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_nothing_unpickles(module: str) -> None:
    assert not list(find_unsafe_loads(parse(module)))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "eval(text)",
    ],
)
def test_an_unsafe_load_is_seen(source: str) -> None:
    assert list(find_unsafe_loads(ast.parse(source)))


def test_switching_to_evaluation_is_no_eval() -> None:
    assert not list(find_unsafe_loads(ast.parse("model.eval(); np.load(path); safe_open(path)")))


# Starting ----------------------------------------------------------------------------------------------------------

HEAVY = ("torch", "sklearn", "scipy", "matplotlib", "pyarrow", "huggingface_hub", "PIL", "jinja2")


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["help", "import"])
def test_what_starts_fast_imports_nothing_heavy(arguments: list[str]) -> None:
    """``nestling --help`` and ``import nestling`` in a process of their own, which then says what it has imported."""
    script = (
        "import sys, nestling\n"
        "if sys.argv[1:]:\n"
        "    from nestling.__main__ import main\n"
        "    try:\n"
        "        code = main()\n"
        "    except SystemExit as end:\n"
        "        code = end.code\n"
        "    assert not code, code\n"
        f"print('\\nheavy:', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "heavy:"
