"""Other people's formats: weights and models of Hugging Face, GGUF, PyTorch and Flax, in and out."""
