"""What keeps a run whole, with no word of retrieval: checkpoints, resuming, interruption, the Hub, many processes."""
