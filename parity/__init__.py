"""The proof that both implementations are the same mathematics, and the converter of weights between them."""
