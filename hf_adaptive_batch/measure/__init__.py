"""Measure: the gradients of one optimizer step become one `GradientMoments`.

`moments` is float arithmetic on the standard library; `probe` is the only module that touches
gradients. Import them by module: this package imports neither, so that `decide/` can use the
moments without loading torch.
"""
