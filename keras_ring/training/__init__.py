"""Between Keras' trainers and a strategy: checks, batches, steps, counts."""
