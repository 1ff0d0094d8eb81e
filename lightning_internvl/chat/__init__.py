"""Talking to finished models: the conversation itself, and the terminal and the page that show
it."""
