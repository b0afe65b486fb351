"""What the Dockerfile says; that its steps work is for `fastblt.deploy.image.prove`, which needs root and minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fastblt.deploy.image.dockerfile import Instruction, expand, read
from fastblt.deploy.image.prove import Builder
from fastblt.deploy.monitoring import DASHBOARD

ROOT = Path(__file__).resolve().parents[2]


def ours() -> list[Instruction]:
    return list(read((ROOT / "Dockerfile").read_text()))


def test_reading() -> None:
    text = (
        '# no\nFROM a AS b\nRUN one \\\n    # not either\n    && two\n\nCOPY --from=b /x /y\nENTRYPOINT ["p", "q r"]\n'
    )
    begin, run, copy, entry = read(text)
    assert (begin.name, begin.rest) == ("FROM", "a AS b")
    assert run.rest.split() == ["one", "&&", "two"]
    assert copy.flags == {"from": "b"} and copy.words() == ["/x", "/y"]
    assert entry.words() == ["p", "q r"]
    assert expand("$A/${B}:$C", {"A": "1", "B": "2"}) == "1/2:"
    with pytest.raises(ValueError, match="is no instruction"):
        list(read("FROM a\nwhat\n"))


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = {s for one in ours() if one.name == "COPY" and not one.flags for s in one.words()[:-1]}
    assert sources and sources <= kept
    assert all((ROOT / source).exists() for source in sources)


def test_a_user_without_rights_before_the_entry_point() -> None:
    names = [one.name for one in ours()]
    user = next(one for one in ours() if one.name == "USER")
    assert user.rest.split(":")[0].isdecimal() and user.rest.split(":")[0] != "0"
    assert names.index("USER") < names.index("ENTRYPOINT") and "HEALTHCHECK" in names


def test_both_variants_are_stages() -> None:
    stages = {one.rest.split(" AS ")[-1] for one in ours() if one.name == "FROM"}
    assert {"cpu", "cuda", "${VARIANT}"} <= stages


def test_steps_are_carried_out(tmp_path: Path) -> None:
    """All but RUN, on a base of one file."""
    (tmp_path / "base" / "etc").mkdir(parents=True)
    (tmp_path / "base" / "etc" / "own").write_text("base")
    builder = Builder(tmp_path / "base", tmp_path / "work", {"GIVEN": "yes"}, [])
    stage = builder.build(
        "ARG WHICH=second\nFROM python AS first\nARG GIVEN\nENV A=$GIVEN\n"
        "WORKDIR /in\nCOPY LICENSE ./\nCOPY kernels k\n"
        'FROM python AS second\nCOPY --from=first /in /out\nENV C=c\nUSER 5:5\nFROM ${WHICH}\nENTRYPOINT ["x"]\n'
    )
    assert (stage.folder / "out" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (stage.folder / "out" / "k" / "attention.py").exists() and (stage.folder / "etc" / "own").exists()
    assert stage.user == "5:5" and stage.environment["C"] == "c" and "A" not in stage.environment
    assert stage.entrypoint == ["x"]
    first = builder._stages["first"]
    assert first.environment["A"] == "yes" and first.arguments == {"GIVEN": "yes"}


def test_compose_mounts_what_is_there() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yaml").read_text())
    mounts = [v.split(":")[0] for one in compose["services"].values() for v in one.get("volumes", ())]
    files = [ROOT / mount for mount in mounts if mount.startswith("./")]
    assert len(files) == 4 and all(path.exists() for path in files)
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/fastblt.yaml").read_text())
    folder = provider["providers"][0]["options"]["path"]
    assert any(
        v.startswith(f"./{DASHBOARD.relative_to(ROOT)}:{folder}/") for v in compose["services"]["grafana"]["volumes"]
    )
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["uid"] in DASHBOARD.read_text()
