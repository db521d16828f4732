"""`python -m hf_moecal.cli`, as `accelerate launch --module hf_moecal.cli` starts it."""

from .commands import main


if __name__ == "__main__":
    raise SystemExit(main())
