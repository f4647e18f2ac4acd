"""The bottleneck layer, and writing names into its state."""
