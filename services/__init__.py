"""The local platform: embedded PostgreSQL, MLflow and a real Airflow as background processes.

Only `make run`, `make down` and the tests use it; a cluster or an Airflow of your own does not.
"""
