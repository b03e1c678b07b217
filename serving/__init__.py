"""The registered model over HTTP: predictions, reasons, and what the model is."""
