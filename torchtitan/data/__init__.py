"""From documents to batches: sources, the slots that read them, packing, and the loader."""
