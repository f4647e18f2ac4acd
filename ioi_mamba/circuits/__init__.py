"""The model as a graph: patching, attribution, search, and how well a circuit stands for the model."""
