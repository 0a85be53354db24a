"""Large arrays on disk: activations of tokens, and the sparse features made from them."""
