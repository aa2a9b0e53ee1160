"""End to end: real brokers, real agents and real programs, killed, flooded and filled up."""
