"""The benchmark: `python -m bench` measures ingestion, dbt, the DAG and a pandas baseline."""
