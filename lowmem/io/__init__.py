"""Files: atomic writes, the safetensors container, shards, metadata, checkpoints and adapters."""
