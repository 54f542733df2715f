"""Complete programs that use convrnn; run them as ``python -m examples.NAME`` from the root of the checkout."""
