"""Transformers in NumPy, every gradient by hand: attention, positions, the encoder-decoder of 2017 and a GPT, in float64.

They share no line with the JAX layers, so that each can be held against the other. Each file but `layers` and `adam` runs:
python -m minllm.course.numpy.gpt
"""
