"""Settings of Prometheus and its company, checked by the programs themselves."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from services.observability import (
    configuration,
    free_udp_port,
)
from settings import PROJECT_ROOT


def test_a_wrong_setting_ends_make_up_before_anything_is_started(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services", "up"],
        cwd=PROJECT_ROOT,
        env={
            **os.environ,
            "DIABETES_STATE_DIR": str(tmp_path),
            "DIABETES_ALERTMANAGER": "/no/such/alertmanager",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "error: DIABETES_ALERTMANAGER is /no/such/alertmanager, which is no program; "
        "name its file, or say off"
    ]
    assert not (tmp_path / "postgres" / "data").exists()


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool on the PATH")
@pytest.mark.parametrize(
    ("rule", "code"), [("up == 0", 0), ("up ==", 1)], ids=["a rule", "a broken rule"]
)
def test_promtool_accepts_the_configuration(tmp_path: Path, rule: str, code: int) -> None:
    rules = tmp_path / "rules.yaml"
    group = {"name": "of_a_test", "rules": [{"alert": "Down", "expr": rule}]}
    rules.write_text(yaml.safe_dump({"groups": [group]}))
    file = tmp_path / "prometheus.yaml"
    made = configuration({"api": "127.0.0.1:1"}, alertmanager="127.0.0.1:2", rules=[rules])
    file.write_text(yaml.safe_dump(made))
    done = subprocess.run(
        ["promtool", "check", "config", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr


def test_a_taken_udp_port_is_left_alone() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        assert free_udp_port(port) != port
