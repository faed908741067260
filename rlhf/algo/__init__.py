"""Pure tensor maths: tensors and floats in, tensors out. Imports torch only.

Masks are bool, True = counts. Everything is computed in float32 (sums for means and variances in
float64), whatever dtype comes in. Numbers in brackets, as in (28), are statements of ALGORITHM.md.
"""
