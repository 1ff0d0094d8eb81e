"""Several processes: collectives, sharding, tensor parallelism."""
