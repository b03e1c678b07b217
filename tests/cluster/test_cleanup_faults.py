"""scripts/cleanup.sh broken off; the next run goes on."""

from __future__ import annotations

import signal

from tests.deploy.apiserver import Request
from tests.deploy.desk import Desk, ended, kill
from tests.deploy.test_cleanup import KEPT, left


def test_broken_off_it_can_be_run_again(deployed: Desk) -> None:
    def strike(request: Request) -> None:
        if request.verb == "delete" and request.resource == "statefulsets":
            kill(process)

    deployed.cluster.after_change = strike
    with deployed.start("cleanup.sh") as process:
        assert ended(process).code == -signal.SIGKILL
    deployed.cluster.after_change = None
    deployed.run("cleanup.sh").fine()
    assert {key[0] for key in left(deployed)} == KEPT


def test_interrupted(deployed: Desk) -> None:
    def strike(request: Request) -> None:
        if request.verb == "delete" and request.resource == "deployments":
            kill(process, signal.SIGINT)

    deployed.cluster.after_change = strike
    with deployed.start("cleanup.sh") as process:
        run = ended(process)
    run.failed("interrupted: ", "run the same command again", code=130)
