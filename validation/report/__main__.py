"""`python -m validation.report`; the guard keeps worker processes, which import this again, from starting over."""

from validation.report.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
