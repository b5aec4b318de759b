"""`loha train`: diffusers pipelines."""
