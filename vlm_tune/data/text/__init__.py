"""What a conversation is as text: templates, tokens, and the pieces between them."""
