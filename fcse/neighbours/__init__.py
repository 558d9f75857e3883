"""Six neighbours of Focal-InfoNCE: what each changes beside the logits, in a room of its own."""
