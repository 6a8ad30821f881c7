"""Every setting is read by the program: an option that nobody reads does nothing, and is refused here (T44).

The source is walked without running it.  A read is an attribute `x.rank` where x is known to be a LoraConfig: a parameter, variable or
attribute annotated so, a variable set from one, or the end of a chain `run.lora`.  Reads inside halfbyte/config do not count.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from halfbyte.config import DataConfig, LoraConfig, ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig

SOURCE = Path(__file__).resolve().parents[2] / "halfbyte"
GROUPS: dict[str, type[BaseModel]] = {
    "model": ModelConfig, "quant": QuantConfig, "lora": LoraConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig,
}  # fmt: skip
KINDS: dict[str, type[BaseModel]] = {kind.__name__: kind for kind in (RunConfig, *GROUPS.values())}
# A property of RunConfig that answers for a setting.
PROPERTIES = {("RunConfig", "quant_format"): ("QuantConfig", "format")}


def _kind_named(annotation: ast.expr | None) -> str:
    """The settings class an annotation names, also as `LoraConfig | None`, "LoraConfig" or `config.LoraConfig`."""
    if annotation is None:
        return ""
    words = [node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    words += [node.attr for node in ast.walk(annotation) if isinstance(node, ast.Attribute)]
    for node in ast.walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words += re.findall(r"\w+", node.value)
    return next((word for word in words if word in KINDS), "")


class _Reads(ast.NodeVisitor):
    """Collects (class, field) for every read in one module; `attributes` maps annotated attribute names to their class."""

    def __init__(self, attributes: dict[str, str]) -> None:
        self.attributes = attributes
        self.names: list[dict[str, str]] = [{}]
        self.found: set[tuple[str, str]] = set()

    def kind_of(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.names) if node.id in scope), "")
        if isinstance(node, ast.Attribute):
            if node.attr in GROUPS and self.kind_of(node.value) in ("RunConfig", ""):
                return GROUPS[node.attr].__name__ if self.kind_of(node.value) == "RunConfig" else self.attributes.get(node.attr, "")
            return self.attributes.get(node.attr, "")
        if isinstance(node, ast.IfExp):
            return self.kind_of(node.body) or self.kind_of(node.orelse)
        if isinstance(node, ast.Call):
            return _kind_named(node.func) or ("RunConfig" if getattr(node.func, "id", "") == "load_config" else "")
        return ""

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.names.append({arg.arg: _kind_named(arg.annotation) for arg in every if _kind_named(arg.annotation)})
        self.generic_visit(node)
        self.names.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name) and _kind_named(node.annotation):
            self.names[-1][node.target.id] = _kind_named(node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for left, right in pairs:
                if isinstance(left, ast.Name) and self.kind_of(right):
                    self.names[-1][left.id] = self.kind_of(right)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        kind = self.kind_of(node.value)
        if kind and isinstance(node.ctx, ast.Load):
            self.found.add((kind, node.attr))
            if (kind, node.attr) in PROPERTIES:
                self.found.add(PROPERTIES[kind, node.attr])
        self.generic_visit(node)


def _modules() -> Iterator[ast.Module]:
    for path in sorted(SOURCE.rglob("*.py")):
        if "config" not in path.relative_to(SOURCE).parts[:1]:
            yield ast.parse(path.read_text(encoding="utf-8"))


def _annotated_attributes(modules: list[ast.Module]) -> dict[str, str]:
    """Names of attributes that hold settings: annotated in a class body, or set from an annotated parameter in a method."""
    found: dict[str, str] = {}
    for owner in (node for module in modules for node in ast.walk(module) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(owner):
            if isinstance(node, ast.AnnAssign) and _kind_named(node.annotation):
                name = node.target.id if isinstance(node.target, ast.Name) else getattr(node.target, "attr", "")
                found[name] = _kind_named(node.annotation)
        for method in (node for node in owner.body if isinstance(node, ast.FunctionDef)):
            kinds = {arg.arg: _kind_named(arg.annotation) for arg in [*method.args.args, *method.args.kwonlyargs]}
            for node in ast.walk(method):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and kinds.get(node.value.id):
                    found |= {target.attr: kinds[node.value.id] for target in node.targets if isinstance(target, ast.Attribute)}
    return found


def unread() -> list[str]:
    """Settings no module outside halfbyte/config reads, as `LoraConfig.rank`."""
    modules = list(_modules())
    attributes = _annotated_attributes(modules)
    found: set[tuple[str, str]] = set()
    for module in modules:
        reads = _Reads(attributes)
        reads.visit(module)
        found |= reads.found
    return [f"{name}.{field}" for name, kind in KINDS.items() for field in kind.model_fields if (name, field) not in found]


def test_no_setting_is_unread() -> None:  # T44
    assert unread() == []


def test_the_walk_sees_reads_and_only_reads() -> None:
    module = ast.parse(
        "def f(config: RunConfig, other, lora: 'LoraConfig | None'):\n"
        "    train = config.train\n    a, b = config.optim, other\n"
        "    return train.seed, a.eps, b.betas, other.rank, lora.alpha, config.quant_format, config.data.path\n"
    )
    reads = _Reads({})
    reads.visit(module)
    kept = {pair for pair in reads.found if pair[0] != "RunConfig"}
    assert kept == {
        ("TrainConfig", "seed"), ("OptimConfig", "eps"), ("LoraConfig", "alpha"), ("QuantConfig", "format"), ("DataConfig", "path"),
    }  # fmt: skip


if __name__ == "__main__":
    print("\n".join(unread()))
