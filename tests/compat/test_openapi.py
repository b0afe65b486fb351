"""schemathesis, all checks, on /openapi.json of a real server process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.compat.conftest import KEY

# A body whose fields are all well may still ask for what does not go together (`stream_options` without `stream`) or is
# too much for this server: no JSON schema says so. Wherever else a valid body is refused, it is a failure.
CONFIG = """
[[operations]]
include-path = "/v1/completions"
[operations.checks]
positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 429]
"""


def test_the_server_is_what_its_schema_says(url: str, tmp_path: Path) -> None:
    config = tmp_path / "schemathesis.toml"
    config.write_text(CONFIG)
    command = [
        *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
        *("--config-file", str(config), "run", f"{url}/openapi.json", "-H", f"Authorization: Bearer {KEY}"),
        "--checks=all",
        "--phases=coverage,fuzzing",
        "--max-examples=10",
        "--seed=1",
        "--generation-database=none",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: 11" in done.stdout, done.stdout
