"""Settings of a generation that draw in every way that there is."""

SAMPLING = [
    {},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 40, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"temperature": 0.8, "min_p": 0.05},
]
