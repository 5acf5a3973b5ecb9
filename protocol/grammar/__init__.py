"""Grammars: what a generation may say, token by token. One library at both ends, so that both know the same."""
