"""Measurements of the hot paths, each beside what something else reaches on the same bytes in the same run.

`python -m bench` runs them; docs/performance.md says what they measure and what was reached. The product is measured
as it is installed: its own commands, its own protocol, figures from the kernel. Nothing here is part of the product.
"""
