"""compressed-tensors: integers of 4 bits and MXFP4 in folders that vLLM and transformers load."""
