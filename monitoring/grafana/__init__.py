"""Grafana: dashboards made by code, and how they are provisioned."""
