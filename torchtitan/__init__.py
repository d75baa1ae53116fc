"""A PyTorch-native LLM training framework where the mesh is a deployment detail."""
