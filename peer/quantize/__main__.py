"""`python -m petal.peer.quantize`: what `petal quantize` starts."""

from .cli import main

main()
