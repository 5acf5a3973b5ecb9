"""The door that people use: OpenAI's, Anthropic's and Ollama's APIs over a swarm, in one process without torch."""
