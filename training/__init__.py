"""clean_data -> a registered champion: data, features, candidates, evaluation, registry."""
