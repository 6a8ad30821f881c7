"""What the source may not contain, read from its syntax tree: code from strings, pickle, patched libraries, dumps, giants."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "halfbyte"
FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "exec", "eval", "compile", "__import__", "torch.load", "os.system", "os.popen", "os.execv", "os.execvp", "subprocess.getoutput",
    "subprocess.getstatusoutput", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all", "torch.jit.load",
    "torch.package.PackageImporter", "pandas.read_pickle", "torch.hub.load", "warnings.filterwarnings", "warnings.simplefilter",
}  # fmt: skip
FORBIDDEN_VALUES = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}
HOMES = {
    "transformers": ("models/", "data/"), "numba": ("kernels/",), "triton": ("kernels/",), "matplotlib": ("pages/",),
    "typer": ("cli/",), "click": ("cli/",), "pydantic": ("config/",), "gguf": ("formats/", "models/"),
    "safetensors": ("formats/", "train/"),
    "sacrebleu": ("evaluate/",), "rouge_score": ("evaluate/",), "pyarrow": ("data/",), "datasets": ("data/",),
    "jinja2": ("pages/", "data/"), "yaml": ("config/",), "wandb": ("train/",), "mlflow": ("train/",), "trackio": ("train/",),
    "peft": (), "bitsandbytes": (), "trl": (), "accelerate": (), "requests": (), "httpx": (), "pandas": (),
}  # fmt: skip
CODE_FIRST = {"_fault", "Problem", "Clash"}  # calls of halfbyte/config whose first two arguments are the code and its rule
CODE = re.compile(r"E-(CONF|DATA|MODEL|WEIGHT|TARGET|ADAPT|UNSUP|ENV|CKPT|STORE|NUM|FIT|BUG|STOP)-\d{3}\Z")


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((SOURCE / file).read_text(encoding="utf-8"))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def _imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str, str]]:
    """(statement, local name, full dotted name) of everything imported anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                full = alias.name if alias.asname else alias.name.partition(".")[0]
                yield node, alias.asname or full, alias.name if alias.asname else full
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield node, alias.asname or alias.name, f"{node.module}.{alias.name}"


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    head, _, rest = _dotted(node).partition(".")
    return f"{names.get(head, head)}.{rest}" if rest else names.get(head, head)


def forbidden(tree: ast.Module) -> list[str]:
    """Pickle, code from strings, shells, unsafe loaders, muted warnings."""
    found = [f"line {node.lineno}: imports {full}" for node, _, full in _imports(tree) if full.partition(".")[0] in PICKLES]
    names = {local: full for _, local, full in _imports(tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if _full_name(node.func, names) in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: calls {_full_name(node.func, names)}")
        given = {keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)}
        found += [f"line {node.lineno}: {name}={value}" for name, value in FORBIDDEN_VALUES.items() if given.get(name) is value]
    return found


def environment_reads(tree: ast.Module) -> list[str]:
    names = {local: full for _, local, full in _imports(tree)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)]
    wanted = {"os.environ", "os.getenv", "os.putenv", "os.environb"}
    return [f"line {node.lineno}: {_full_name(node, names)}" for node in nodes if _full_name(node, names) in wanted]


def foreign_assignments(tree: ast.Module) -> list[str]:
    """Assignments and deletions of attributes (or items) of an imported module, class or function that is not ours, setattr included."""
    foreign = {local for _, local, full in _imports(tree) if full.partition(".")[0] != "halfbyte"}
    found = []
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = list(node.targets)
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and _dotted(node.func) in ("setattr", "delattr") and node.args:
            targets = [ast.Attribute(node.args[0], "?", ast.Store())]
        for target in [part for one in targets for part in (one.elts if isinstance(one, ast.Tuple) else [one])]:
            root = target
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            own = ast.unparse(target).startswith("sys.modules[__name__]")
            if root is not target and isinstance(root, ast.Name) and root.id in foreign and not own:
                found.append(f"line {getattr(node, 'lineno', 0)}: assigns to {root.id}.{getattr(target, 'attr', '[]')}")
    return found


def wide_excepts(tree: ast.Module) -> list[str]:
    """Handlers that swallow any error; one that cleans up and raises the same error again swallows nothing."""
    handlers = [node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)]
    handlers = [node for node in handlers if not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None)]
    wide = {"", "Exception", "BaseException"}
    kinds = [(handler, handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]) for handler in handlers]
    return [f"line {handler.lineno}" for handler, types in kinds if any((_dotted(kind) if kind else "") in wide for kind in types)]


def long_functions(tree: ast.Module, limit: int = 60) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    return [f"{name}: {length} lines" for name, length in lengths.items() if length > limit]


def foreign_homes(file: str, tree: ast.Module) -> list[str]:
    """Imports of a library outside its home; names that only type checkers see are free."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _dotted(node.test).endswith("TYPE_CHECKING")]
    unseen = {id(inner) for block in blocks for inner in ast.walk(block)}
    found = []
    for node, _, full in _imports(tree):
        if id(node) in unseen:
            continue
        homes = HOMES.get(full.partition(".")[0])
        if homes is not None and not file.startswith(homes or ("-",)):
            found.append(f"line {node.lineno}: imports {full.partition('.')[0]}, at home in {', '.join(homes) or 'no unit'}")
    return found


def _text(node: ast.expr) -> str:
    """A rule's text with its varying parts as {}; a text that is not written here is its source."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else f"<{ast.unparse(node)}>"


def rules_by_code() -> dict[str, set[str]]:
    """Error code -> the rule texts it is raised with."""
    rules: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        for node in ast.walk(_tree(file)):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and CODE.match(str(key.value)) and isinstance(value, ast.Call) and value.args:
                        rules[str(key.value)].add(_text(value.args[0]))
            if isinstance(node, ast.Call) and node.args:
                for keyword in node.keywords:
                    if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                        rules[str(keyword.value.value)].add(_text(node.args[0]))
                code = _text(node.args[0])
                if file.startswith("config/") and _dotted(node.func) in CODE_FIRST and CODE.match(code):
                    rules[code].add(_text(node.args[1]))
    return rules


@pytest.mark.parametrize("file", FILES)
def test_nothing_runs_what_it_reads(file: str) -> None:
    assert forbidden(_tree(file)) == []


@pytest.mark.parametrize("file", [file for file in FILES if file != "env.py"])
def test_only_env_reads_the_environment(file: str) -> None:
    assert environment_reads(_tree(file)) == []


@pytest.mark.parametrize("file", FILES)
def test_no_attribute_of_another_library_is_assigned(file: str) -> None:
    assert foreign_assignments(_tree(file)) == []


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("cli/")])
def test_no_wide_except_but_at_the_border(file: str) -> None:
    assert wide_excepts(_tree(file)) == []


@pytest.mark.parametrize("file", FILES)
def test_heavy_libraries_stay_at_home(file: str) -> None:
    assert foreign_homes(file, _tree(file)) == []


@pytest.mark.parametrize("file", FILES)
def test_no_giants_and_no_dumps(file: str) -> None:
    assert long_functions(_tree(file)) == []
    assert len((SOURCE / file).read_text(encoding="utf-8").splitlines()) <= 400
    assert not {Path(file).stem, *Path(file).parts} & {"utils", "util", "helpers", "helper", "common", "misc"}


@pytest.mark.parametrize("file", FILES)
def test_every_module_says_what_it_is_for(file: str) -> None:
    assert ast.get_docstring(_tree(file))


def test_one_code_one_rule() -> None:
    rules = rules_by_code()
    assert len(rules) > 100
    assert {code: texts for code, texts in rules.items() if len(texts) > 1} == {}
    assert [code for code in rules if not CODE.match(code)] == []


def test_the_checks_see_what_they_forbid() -> None:
    bad = ast.parse(
        "import os, torch, pickle\nfrom yaml import load\nfrom transformers import Trainer as T\nfrom os import environ\n"
        "eval('1')\ntorch.load('x')\nload('x')\nos.system('x')\nrun('x', shell=True)\n"
        "torch.nn.Linear.forward = None\nT.step = 1\nos.environ['A'] = '1'\nsetattr(torch, 'x', 1)\ndel torch.x\ntorch.a, b = 1, 2\n"
        "try:\n    pass\nexcept Exception:\n    pass\ntry:\n    pass\nexcept (ValueError, BaseException):\n    pass\n"
        "try:\n    pass\nexcept:\n    pass\n"
    )
    assert len(forbidden(bad)) == 6
    assert len(foreign_assignments(bad)) == 6
    assert environment_reads(bad)
    assert len(wide_excepts(bad)) == 3


def test_the_checks_let_plain_code_pass() -> None:
    good = ast.parse(
        "import torch\nfrom halfbyte import x\nx.y = 1\nmodel.eval()\nmodel.z = 2\ntry:\n    pass\nexcept OSError:\n    pass\n"
        "try:\n    pass\nexcept BaseException:\n    clean()\n    raise\n"
    )
    assert forbidden(good) + foreign_assignments(good) + wide_excepts(good) + environment_reads(good) == []
    assert long_functions(ast.parse("def f():\n" + "    x = 1\n" * 60)) == ["f: 61 lines"]
    uses = ast.parse("import transformers")
    assert foreign_homes("lora/layer.py", uses) and not foreign_homes("models/load.py", uses)
