"""The model: loading, the packed forward pass, tokens to text and back."""
