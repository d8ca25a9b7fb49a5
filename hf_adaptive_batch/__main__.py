"""`python -m hf_adaptive_batch` is `hf-adaptive-batch`."""

from .cli import main


if __name__ == "__main__":
    raise SystemExit(main())
