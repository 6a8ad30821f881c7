"""Write the tree of modules into docs/ARCHITECTURE.md, one line each, from their own docstrings: `python docs/make_tree.py`."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "ARCHITECTURE.md"
MARKS = ("<!-- tree -->\n", "<!-- /tree -->")


def first_line(path: Path) -> str:
    """The first sentence of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]


def tree(folder: Path, depth: int = 0) -> list[str]:
    """Lines `name   what it is for`, packages before their modules."""
    lines = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir() and (path / "__init__.py").exists():
            lines += [f"{'  ' * depth}{path.name + '/':<{30 - 2 * depth}}{first_line(path / '__init__.py')}", *tree(path, depth + 1)]
        elif path.suffix == ".py" and path.name != "__init__.py":
            lines.append(f"{'  ' * depth}{path.name:<{30 - 2 * depth}}{first_line(path)}")
    return lines


def page() -> str:
    """The page with a fresh tree."""
    head, rest = PAGE.read_text().split(MARKS[0])
    tail = rest.split(MARKS[1])[1]
    return head + MARKS[0] + "```\n" + "\n".join(tree(ROOT / "halfbyte")) + "\n```\n" + MARKS[1] + tail


if __name__ == "__main__":
    PAGE.write_text(page())
