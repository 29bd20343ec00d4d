"""What makes a training step small and fast: the loss over a vocabulary, and what is saved for backward."""
