"""How well a LoHa learns beside a LoRA of as many parameters: three tasks, every method at every learning rate.

    pip install -e '.[demo,comfyui,quality]'
    python -m benchmarks.quality                                    # all of it: hours on two cores
    python -m benchmarks.quality --tasks language --methods lora balanced --rates 0.01 --seeds 0
    python -m benchmarks.quality --table                            # of what has been measured so far

A run is the same frozen model, the same batches in the same order and the same held-out data for every method, so that
methods are compared in pairs; a seed changes the batches and the first values. Pretrained models are made on first use.
"""
