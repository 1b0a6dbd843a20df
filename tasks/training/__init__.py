"""Training: rows of a training set → token sequences → batches → a LoRA adapter, and an adapter merged into its base."""
