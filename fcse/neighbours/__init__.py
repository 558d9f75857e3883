"""Views and negatives that look beyond the batch: CARDS' retrieval and case, IFND's clusters."""
