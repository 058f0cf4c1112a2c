"""From an instruction file to the batches of a rank: rows (alpaca), tokens (examples), order and packing (batches)."""
