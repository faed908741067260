"""Talking to models in a terminal: `rlhf chat` (launch/chat.py) starts main.py here."""
