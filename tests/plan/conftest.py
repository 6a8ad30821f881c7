import json
from pathlib import Path

import pytest

from tests.plan.asked import SMALL


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config.json of SMALL."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    return path
