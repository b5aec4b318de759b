"""FedPara and federated LoHa beside what they compete with: accuracy by round and by bytes, three seeds.

    pip install -e '.[federated,federated-data]'
    python -m benchmarks.federated                        # all of it: about two hours of one core; goes on where it was
    python -m benchmarks.federated --parts digits
    python -m benchmarks.federated --table                # tables and curves of what has been measured so far
    python -m benchmarks.federated.loopback               # SuperLink, three SuperNodes, one of which is killed

A run is the Flower app in examples/federated with other settings, its clients one after another in this process
(`grid.InProcess`): the messages, and with them the bytes, are those of `flwr run`. Runs are lines of
.cache/federated/runs.jsonl; one that is there is not run again.
"""
