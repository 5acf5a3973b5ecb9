"""What a model's words are: text, reasoning or calls of tools, told apart while they come."""
