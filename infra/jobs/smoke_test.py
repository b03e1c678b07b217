"""Does MLflow work? Logs a run with a parameter, a metric and an artifact, and reads all back."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from infra.jobs.common import JobError, one_line, run, variable

EXPERIMENT = "smoke-test"
_BYTES = 12 * 1024**2  # more than boto3 sends in one piece (8 MiB)


def smoke_test(uri: str) -> str:
    """Do it; the run is deleted after that, its artifact too.

    Raises:
        JobError: something failed, or came back otherwise than it was logged.
    """
    # Read when mlflow is imported; a Job's log is no terminal.
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    # Seconds of import, not needed to say what is wrong with the arguments.
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = MlflowClient(uri)
    began = time.monotonic()
    content = os.urandom(_BYTES)
    run_id = ""

    step = "find or make an experiment"
    try:
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
        step = "log a run"
        run_id = client.create_run(experiment).info.run_id
        client.log_param(run_id, "size", _BYTES)
        client.log_metric(run_id, "answer", 42.0)
        with tempfile.TemporaryDirectory() as folder:
            sent = Path(folder, "smoke.bin")
            sent.write_bytes(content)
            step = "store an artifact"
            client.log_artifact(run_id, str(sent))
            sent.unlink()
            step = "read the artifact back"
            back = Path(client.download_artifacts(run_id, sent.name, folder)).read_bytes()
        step = "read the run back"
        data = client.get_run(run_id).data
        if (data.params, data.metrics) != ({"size": str(_BYTES)}, {"answer": 42.0}):
            raise JobError(f"MLflow at {uri} gives back another run than was logged")
        if back != content:
            raise JobError(f"MLflow at {uri} gives back another artifact than was stored")
        step = "delete the run"
        artifacts = get_artifact_repository(client.get_run(run_id).info.artifact_uri)
        artifacts.delete_artifacts("")  # type: ignore[no-untyped-call]
        client.delete_run(run_id)
    except (MlflowException, OSError, JobError) as error:
        if run_id:
            with suppress(MlflowException, OSError):
                client.delete_run(run_id)
        if isinstance(error, JobError):
            raise
        raise JobError(f"MLflow at {uri} can't {step}: {one_line(error)}") from error
    return (
        f"MLflow works: a run with an artifact of {_BYTES / 1024**2:.0f} MiB logged, read back "
        f"and deleted in {time.monotonic() - began:.1f} s"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit code is 0 or 1."""
    parser = argparse.ArgumentParser(prog="python -m infra.jobs.smoke_test", description=__doc__)
    parser.parse_args(argv)
    return run(lambda: smoke_test(variable("MLFLOW_TRACKING_URI")))


if __name__ == "__main__":
    sys.exit(main())
