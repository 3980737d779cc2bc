"""Pure arithmetic on tensors: which micro-batches reached the optimizer, and with which weight. Torch only."""
