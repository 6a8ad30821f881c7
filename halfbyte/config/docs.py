"""Writes docs/config.md and docs/config.schema.json below the current folder: `python -m halfbyte.config.docs`."""

import json
from pathlib import Path

from halfbyte.config.schema import json_schema, markdown


def main() -> None:
    """Write both files."""
    folder = Path("docs")
    folder.mkdir(exist_ok=True)
    (folder / "config.md").write_text(markdown(), encoding="utf-8")
    (folder / "config.schema.json").write_text(json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
