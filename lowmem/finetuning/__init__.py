"""Fine-tuning of language models: text in, an adapter out."""
