"""On Flower: strategies, and a client's side of a round. The modules need `pip install 'comfyui-loha[federated]'`."""
