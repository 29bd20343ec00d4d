"""Training with less memory: a chunked loss, fewer and compressed activations, small optimizer states."""
