"""What a model's adapters are: as files, as state dicts, as a status."""
