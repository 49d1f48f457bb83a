"""Several processes: collectives, sharded training, ranks kept in step."""
