"""What finished models are used for beyond questions about one picture."""
