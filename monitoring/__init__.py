"""What an operator watches: drift, metrics of the pipeline, rules, dashboards."""
