"""Talking to finished models: the conversation, and the terminal and the page that show it."""
