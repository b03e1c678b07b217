"""What the cluster runs beside the services: storage, migration, users, backups, a smoke test."""
