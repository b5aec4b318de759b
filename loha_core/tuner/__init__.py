"""LoHa layers in a model: PEFT's API."""
