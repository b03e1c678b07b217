"""Load tests of the prediction API with Locust."""
