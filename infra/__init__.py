"""Where the platform runs: images, manifests, jobs."""
