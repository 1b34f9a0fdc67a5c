"""LoRA pairs and triples: finding them, their algebra, and what SwitchLoRA exchanges."""
