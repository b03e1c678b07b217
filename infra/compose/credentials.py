"""Credentials of compose.yaml: made at the first start, kept after that, never printed by it.

    docker compose run --rm secrets show

prints the logins that people need. All are kept in one volume, credentials; each service has a
volume of its own with what it needs and nothing more, written anew from there at each start.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import secrets
import string
import sys
from collections.abc import Mapping
from pathlib import Path

PASSWORDS = (
    "postgres",
    "mlflow-database",
    "diabetes-database",
    "airflow-database",
    "storage",
    "mlflow-admin",
    "mlflow-serving",
    "mlflow-pipeline",
    "mlflow-metrics",
    "mlflow-flask",
    "api-page-key",
    "api-operator-key",
    "prediction-log-key",
    "grafana-admin",
    "airflow-admin",
    "airflow-api",
    "airflow-jwt",
    "airflow-fernet",
    "airflow-metrics",
    "postgres-monitoring",
    "postgres-reader",
)
_ALPHABET = string.ascii_letters + string.digits  # needs no quoting in URLs, shells and INI files
_ADMIN = "adminuser"
_STORAGE_ID = 10001
"""Silo runs as this user, and its image leaves the data folder to root."""


def load(store: Path) -> dict[str, str]:
    """The passwords by name; the ones that are missing are made and kept.

    Raises:
        ValueError: the store is broken.
    """
    found: dict[str, str] = json.loads(store.read_text()) if store.exists() else {}
    missing = [name for name in PASSWORDS if name not in found]
    found |= {name: _make(name) for name in missing}
    if missing:
        partial = store.with_suffix(".part")
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(found, indent=2))
        partial.replace(store)
    return found


def _make(name: str) -> str:
    if name == "airflow-fernet":
        return base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return "".join(secrets.choice(_ALPHABET) for _ in range(32))


def files(password: Mapping[str, str]) -> dict[str, str]:
    """What each service gets: `<service>/<file>` and its content.

    The values of files named `env` are free of characters that a shell would read otherwise.
    """
    databases = {name: password[f"{name}-database"] for name in ("mlflow", "diabetes", "airflow")}
    address = {name: f"{name}:{word}@postgres:5432/{name}" for name, word in databases.items()}
    storage = {"AWS_ACCESS_KEY_ID": _ADMIN, "AWS_SECRET_ACCESS_KEY": password["storage"]}
    key_hashes = ",".join(
        f"{name}:{hashlib.sha256(password[f'api-{name}-key'].encode()).hexdigest()}"
        for name in ("page", "operator")
    )
    return {
        "postgres/superuser-password": password["postgres"],
        "minio/access-key": _ADMIN,
        "minio/secret-key": password["storage"],
        "init-storage/env": _env(
            PGPASSWORD=password["postgres"],
            **{f"{name.upper()}_PASSWORD": word for name, word in databases.items()},
            MONITORING_PASSWORD=password["postgres-monitoring"],
            READER_PASSWORD=password["postgres-reader"],
            **storage,
        ),
        "mlflow/env": _env(
            MLFLOW_BACKEND_STORE_URI=f"postgresql+psycopg2://{address['mlflow']}",
            MLFLOW_AUTH_ADMIN_PASSWORD=password["mlflow-admin"],
            MLFLOW_FLASK_SERVER_SECRET_KEY=password["mlflow-flask"],
            **storage,
        ),
        "mlflow/basic_auth.ini": "\n".join(
            (
                "[mlflow]",
                "default_permission = READ",
                f"database_uri = postgresql+psycopg2://{address['mlflow']}",
                "admin_username = admin",
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
                "auth_cache_ttl_seconds = 60",
                "",
            )
        ),
        "mlflow-users/env": _env(
            MLFLOW_TRACKING_PASSWORD=password["mlflow-admin"],
            **{
                f"{name.upper()}_PASSWORD": password[f"mlflow-{name}"]
                for name in ("serving", "pipeline", "metrics")
            },
        ),
        "airflow/env": _env(
            AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"postgresql+psycopg2://{address['airflow']}",
            AIRFLOW__CORE__FERNET_KEY=password["airflow-fernet"],
            AIRFLOW__API__SECRET_KEY=password["airflow-api"],
            AIRFLOW__API_AUTH__JWT_SECRET=password["airflow-jwt"],
            AIRFLOW_CONN_POSTGRES_DEFAULT=f"postgres://{address['diabetes']}",
            DIABETES_PREDICTION_LOG_KEY=password["prediction-log-key"],
            MLFLOW_TRACKING_PASSWORD=password["mlflow-pipeline"],
        ),
        "airflow/passwords.json": json.dumps(
            {"admin": password["airflow-admin"], "metrics": password["airflow-metrics"]}
        ),
        "api/env": _env(
            DIABETES_API_KEY_HASHES=key_hashes,
            DIABETES_PREDICTION_LOG_KEY=password["prediction-log-key"],
            DIABETES_DB_PASSWORD=databases["diabetes"],
            MLFLOW_TRACKING_PASSWORD=password["mlflow-serving"],
        ),
        "ui/env": _env(DIABETES_API_KEY=password["api-page-key"]),
        "postgres-exporter/password": password["postgres-monitoring"],
        "pipeline-exporter/env": _env(
            DIABETES_DB_PASSWORD=password["postgres-reader"],
            DIABETES_AIRFLOW_PASSWORD=password["airflow-metrics"],
        ),
        "prometheus/metrics-password": password["mlflow-metrics"],
        "grafana/admin-user": _ADMIN,
        "grafana/admin-password": password["grafana-admin"],
    }


def _env(**variables: str) -> str:
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def logins(password: Mapping[str, str]) -> str:
    """Where people log in, and with what."""
    rows = (
        ("MLflow", "http://localhost:5000", "admin", "mlflow-admin"),
        ("Storage console", "http://localhost:9001", _ADMIN, "storage"),
        ("Airflow", "http://localhost:8080", "admin", "airflow-admin"),
        ("Grafana", "http://localhost:3000", _ADMIN, "grafana-admin"),
        ("API (X-API-Key)", "http://localhost:8000/docs", "operator", "api-operator-key"),
    )
    lines = [
        f"{what:<16} {url:<27} {user:<10} {password[name]}\n" for what, url, user, name in rows
    ]
    return "".join([*lines, f"{'Page':<16} http://localhost:8501\n"])


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 1 with one message on standard error.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("write", "show"), nargs="?", default="write")
    parser.add_argument("--store", type=Path, default=Path("/credentials/passwords.json"))
    parser.add_argument("--folder", type=Path, default=Path("/services"))
    parser.add_argument("--storage-data", type=Path, default=Path("/storage-data"))
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "show" and not arguments.store.exists():
            sys.stderr.write("error: there are no credentials yet: docker compose up --wait\n")
            return 1
        password = load(arguments.store)
        if arguments.command == "show":
            sys.stdout.write(logins(password))
            return 0
        for name, content in files(password).items():
            file = arguments.folder / name
            partial = file.with_name(f"{file.name}.part")
            partial.write_text(content)
            # Readable by the one service that has this volume, whichever user it runs as.
            partial.chmod(0o444)
            partial.replace(file)
        os.chown(arguments.storage_data, _STORAGE_ID, _STORAGE_ID)
    except ValueError:
        sys.stderr.write(
            f"error: {arguments.store} is broken; docker compose down --volumes starts anew, "
            "without the data\n"
        )
        return 1
    except OSError as error:
        sys.stderr.write(f"error: the credentials can't be written: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
