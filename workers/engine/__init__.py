"""The render loop: which requests share a forward, how large it is, and the encoder and decoder beside it."""
